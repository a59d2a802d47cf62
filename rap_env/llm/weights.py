"""Weights in a file that is mapped into memory: parts leave memory and come back while the model stays loaded."""

import json
import mmap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rap_env.errors import UnsupportedArchitecture, WeightsReleased, WeightsUnavailable
from rap_env.files import write_pieces
from rap_env.llm.embedded import cache_folder
from rap_env.llm.parts import Cut
from rap_env.mask import PruningMask, Site

_PAGE = mmap.PAGESIZE
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors names them
_LENGTH_BYTES = 8  # in front of a safetensors header

Span = tuple[int, int]  # first byte in the file, and the one behind the last


@dataclass(frozen=True)
class _Stored:
    """A parameter in the file, beginning with a page.

    Attributes:
        name: In the model.
        parameter: Points into the mapping once there is one.
        by_columns: Whether it lies transposed, so that some of its columns are one piece.
        cuts: For each component of the site which rows, or columns, are its own.
    """

    name: str
    parameter: nn.Parameter
    by_columns: bool
    cuts: Sequence[slice]

    @property
    def laid_out(self) -> torch.Tensor:
        """The parameter as the file has it, the dimension that is cut first."""
        values = self.parameter.detach()
        return (values.T if self.by_columns else values).contiguous()


class WeightStore:
    """Keeps the weights of a model's sites in a safetensors file, and only those of some components in memory.

    The parameters are views of a private mapping of the file: to release a component gives its whole pages back to the
    operating system, to restore it reads them again, from the page cache or the disk. Neither copies anything nor
    changes a view, so that a model computes to the last bit what it did before. In the file a site's parts lie in their
    order, each matrix beginning with a page; of the bytes of SmolLM2's parts, 64 channels or a head each, all are whole
    pages. Embedding, head, norms and what a site has beside its parts stay in memory.

    While there is a store the model refuses to run what is not resident (`SwitchableLLM.check`). A forward that is
    running when its weights are released is not disturbed: it reads the pages once more. They then stay in memory, and
    are not counted, until they are released again.

    Only on a CPU, and for weights in floating point.

    Args:
        llm: Its parameters move into the mapping. Where sites have parts their output matrices are stored by columns,
            which changes the model's digest unless they were (`prepare_widths`).
        folder: For the file, which is as large as the weights and is written once for each digest; by default
            `weights` in the cache folder.

    Attributes:
        path: The file.
        resident: What is in memory.

    Raises:
        UnsupportedArchitecture: The weights are quantised, or on another device.
        OSError: The file can't be written.
    """

    def __init__(self, llm, folder: Path | None = None) -> None:
        if llm.device.type != "cpu":
            raise UnsupportedArchitecture(f"expected a model on the CPU; {llm.name} is on {llm.device}")
        names = {id(parameter): name for name, parameter in llm.model.named_parameters()}
        self._stored = {site: list(_stored(llm, site, names)) for site in llm.shape.sites}
        flat = [one for of_site in self._stored.values() for one in of_site]
        for one in flat:
            if one.by_columns and not one.parameter.T.is_contiguous():
                one.parameter.data = one.parameter.data.T.contiguous().T
        llm.weights_changed()
        self.path = (folder or cache_folder() / "weights") / f"{llm.digest}.safetensors"
        header, self._starts, self._size = _layout(flat)
        if not self.path.is_file() or self.path.stat().st_size != self._size:
            write_pieces(self.path, _pieces(header, flat))
        with self.path.open("rb") as file:
            writable = mmap.PROT_READ | mmap.PROT_WRITE  # as torch wants tensors; nothing writes
            self._map = mmap.mmap(file.fileno(), self._size, flags=mmap.MAP_PRIVATE, prot=writable)
        self._bytes = np.frombuffer(self._map, np.uint8)
        for one in flat:
            self._point(one)
        self._lock, self._reader = threading.RLock(), ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._llm, self.resident = llm, PruningMask.all_kept(llm.shape)
        sites = llm.shape.components.sites
        self._positions = {(site.layer, site.kind): range(own.start, own.stop) for site, own in sites}
        llm.store = self

    def check(self, mask: PruningMask) -> None:
        """Refuses a mask that keeps what is not in memory.

        Raises:
            WeightsReleased: There is such a component.
        """
        _refuse_missing(mask, self.resident)

    def check_site(self, site: Site) -> None:
        """As `check`, for what one site runs with."""
        positions = self._positions[site.layer, site.kind]
        parts = range(len(positions)) if site.parts is None else site.parts
        if missing := [positions[part] for part in parts if not self.resident.keep[positions[part]]]:
            raise WeightsReleased([self.resident.components[position].name for position in missing])

    def switch(self, mask: PruningMask) -> None:
        """Applies a mask, with exactly its components in memory: what comes is read first, what goes leaves last.

        Raises what `restore` and `SwitchableLLM.apply` raise; then the mask that was applied stays, with its weights.
        """
        with self._lock:
            self.restore(mask)
            self._llm.apply(mask)
            self.release(mask)

    def release(self, kept: PruningMask) -> None:
        """Lets go of all components but some.

        Args:
            kept: What stays; what is not in memory stays out of it.

        Raises:
            WeightsReleased: The mask that is applied needs what would go.
        """
        with self._lock:
            bits = tuple(keep and here for keep, here in zip(kept.keep, self.resident.keep, strict=True))
            after = PruningMask(kept.components, bits)
            _refuse_missing(self._llm.mask, after)
            going = [here and not stays for here, stays in zip(self.resident.keep, bits, strict=True)]
            self.resident = after  # before the pages go, so that nothing more begins to run on them
            for start, end in self._spans(going):
                first, last = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
                if first < last:
                    self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def restore(self, mask: PruningMask) -> None:
        """Reads what a mask keeps and is not in memory.

        Raises:
            WeightsUnavailable: The file is not what was written; what was in memory still is.
        """
        with self._lock:
            self._read(mask)
            bits = tuple(keep or here for keep, here in zip(mask.keep, self.resident.keep, strict=True))
            self.resident = PruningMask(mask.components, bits)

    def prefetch(self, mask: PruningMask) -> Future:
        """Begins to read what a mask keeps, in a thread of the store; a later `restore` finds it there.

        Returns:
            Done when all of it was read; raises what `restore` raises.
        """
        return self._reader.submit(self._read, mask)

    def _read(self, mask: PruningMask) -> None:
        if (size := self._map.size()) != self._size:  # to touch a page that the file lost would end the process
            raise WeightsUnavailable(f"expected {self._size:,} bytes of weights in {self.path}; it has {size:,}")
        coming = [keep and not here for keep, here in zip(mask.keep, self.resident.keep, strict=True)]
        for start, end in self._spans(coming):
            first = start // _PAGE * _PAGE
            self._map.madvise(mmap.MADV_WILLNEED, first, end - first)
            self._bytes[first:end:_PAGE].sum()  # touches each page

    def _point(self, one: _Stored) -> None:
        values = one.parameter
        shape = values.T.shape if one.by_columns else values.shape
        raw = torch.frombuffer(self._map, dtype=values.dtype, count=values.numel(), offset=self._starts[one.name])
        values.data = raw.view(shape).T if one.by_columns else raw.view(shape)

    def _spans(self, chosen: Sequence[bool]) -> Iterator[Span]:
        """Where the chosen components lie, as few pieces as there are."""
        for site, positions in self._llm.shape.components.sites:
            own = chosen[positions]
            if any(own):
                for one in self._stored[site]:
                    row_bytes = one.parameter.nbytes // one.parameter.shape[1 if one.by_columns else 0]
                    start = self._starts[one.name]
                    cuts = [cut for cut, wanted in zip(one.cuts, own, strict=True) if wanted]
                    yield from _joined((start + cut.start * row_bytes, start + cut.stop * row_bytes) for cut in cuts)


def _refuse_missing(needed: PruningMask, here: PruningMask) -> None:
    if needed.keep != here.keep:
        kept = zip(needed.components, needed.keep, here.keep, strict=True)
        if missing := [component.name for component, wanted, there in kept if wanted and not there]:
            raise WeightsReleased(missing)


def _stored(llm, site: Site, names: Mapping[int, str]) -> Iterator[_Stored]:
    """The parameters of a site that belong to its components; `names` are those of the model's, by identity."""
    layer = llm.layer_of(site)
    if llm.shape.has_parts:
        cuts: list[Cut] = list(layer.cuts(site.kind).values())
        for path, (dim, _own) in cuts[0].items():
            linear = layer.module.get_submodule(path)
            if type(linear) is not nn.Linear:
                raise UnsupportedArchitecture("expected weights in floating point for a store; got quantised ones")
            own = [cut[path][1] for cut in cuts]
            yield _Stored(names[id(linear.weight)], linear.weight, dim == 1, own)
            if dim == 0 and linear.bias is not None:
                yield _Stored(names[id(linear.bias)], linear.bias, False, own)
        return
    for module in layer.modules_of(site.kind):
        for parameter in module.parameters():
            if parameter.dtype not in _TYPES:
                raise UnsupportedArchitecture("expected weights in floating point for a store; got quantised ones")
            by_columns = parameter.ndim == 2 and not parameter.is_contiguous()
            whole = slice(0, parameter.shape[1 if by_columns else 0])
            yield _Stored(names[id(parameter)], parameter, by_columns, [whole])


def _layout(stored: Sequence[_Stored]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors header that ends with a page, where each parameter begins in the file, and the file's bytes."""
    entries, starts, offset = {}, {}, 0
    for number, one in enumerate(stored):
        shape = list(one.parameter.T.shape if one.by_columns else one.parameter.shape)
        end = offset + one.parameter.nbytes
        name = f"{one.name}.T" if one.by_columns else one.name
        entries[name] = {"dtype": _TYPES[one.parameter.dtype], "shape": shape, "data_offsets": [offset, end]}
        starts[one.name] = offset
        offset = -(-end // _PAGE) * _PAGE
        if offset > end:  # the format allows no holes
            filled = {"dtype": "U8", "shape": [offset - end], "data_offsets": [end, offset]}
            entries[f"filled.{number}"] = filled
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _PAGE)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + offset


def _pieces(header: bytes, stored: Iterable[_Stored]) -> Iterator[bytes]:
    yield header
    for one in stored:
        yield one.laid_out.view(-1).view(torch.uint8).numpy().tobytes()
        yield bytes(-one.parameter.nbytes % _PAGE)


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans that touch become one."""
    spans = list(spans)
    edges = [0, *(place for place, (left, right) in enumerate(pairwise(spans), 1) if left[1] != right[0]), len(spans)]
    for first, end in pairwise(edges):
        if first < end:
            yield spans[first][0], spans[end - 1][1]
