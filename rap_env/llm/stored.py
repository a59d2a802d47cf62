"""Tensors of a model that can leave memory, and which of their bytes belong to which component."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

import torch
from torch import nn

from rap_env.components import Site
from rap_env.errors import UnsupportedArchitecture
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.parts import Cut, cut_tensors

TYPES = {  # as safetensors names them
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
}

Span = tuple[int, int]  # first byte in a tensor, and the one behind the last


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a site whose bytes belong to the site's components.

    Attributes:
        name: In the model.
        path: Of its module in the decoder layer.
        parameter: Where the model finds it.
        by_columns: Whether it lies transposed, so that some of its columns are one piece.
        spans: For each component of the site which bytes are its own; None where they are no single piece.
        part_bytes: For each component how many bytes are its own.
        apart: Whether a site that runs with some of its parts has a copy of what they need, or another matrix, so that
            no byte of this tensor is needed then.
        shape: Of the tensor as it lies, the dimension that is cut first.
        n_bytes: Of all of it.
    """

    name: str
    path: str
    parameter: nn.Parameter
    by_columns: bool
    spans: tuple[Span, ...] | None
    part_bytes: tuple[int, ...]
    apart: bool
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def key(self) -> tuple[str, str]:
        """Path of the module in the layer, and the tensor's name in it."""
        return self.path, self.name.rpartition(".")[2]

    @property
    def laid_out(self) -> torch.Tensor:
        """The tensor as it lies, its `shape`."""
        values = self.parameter.detach()
        return (values.T if self.by_columns else values).contiguous()

    def as_used(self, laid_out: torch.Tensor) -> torch.Tensor:
        """What the model computes with, for a tensor as it lies."""
        return laid_out.T if self.by_columns else laid_out

    def needed(self, kept: Sequence[bool]) -> list[Span]:
        """The bytes that have to be in memory where some components of the site are, as few pieces as there are."""
        if self.apart:
            return [(0, self.n_bytes)] if all(kept) else []
        return _joined(compress(self.spans, kept))

    def not_needed(self, kept: Sequence[bool]) -> list[Span]:
        """The other bytes."""
        if self.apart:
            return [] if all(kept) else [(0, self.n_bytes)]
        return _joined(compress(self.spans, [not bit for bit in kept]))


Piece = tuple[Stored, Span]


class Memory(Protocol):
    """Where tensors are while they are needed; raises `WeightsUnavailable` where they can't be read again."""

    by_parts: bool  # whether some bytes of a tensor can leave alone

    def take(self, stored: Sequence[Stored], digest: str) -> None:
        """Begins with tensors that are in memory, of a model with a digest."""

    def read(self, pieces: Sequence[Piece]) -> None:
        """Has pieces in memory when it returns."""

    def release(self, pieces: Sequence[Piece]) -> None:
        """Lets go of pieces; those that are not there are no error."""

    def freed_bytes(self, piece: Piece) -> int:
        """How many of a piece's bytes `release` frees."""

    def readable(self, layer: DecoderLayer, cut: Sequence[Stored], copied: Sequence[Stored]) -> DecoderLayer:
        """A layer of which some tensors can be cut, wherever they are, and some of these copied from then."""

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy where the model runs, whose memory is free as soon as nobody has it."""


def stored_tensors(llm, by_parts: bool) -> dict[Site, list[Stored]]:
    """The tensors of a model's components, by their site.

    Args:
        llm: A `SwitchableLLM`. Where its sites have parts, output matrices in floating point become stored by columns.
        by_parts: Whether bytes of a part can leave while others of the same tensor stay.

    Raises:
        UnsupportedArchitecture: A weight has a type that no file holds; then nothing was changed.
    """
    for name, parameter in llm.model.named_parameters():
        if parameter.dtype not in TYPES:
            raise UnsupportedArchitecture(f"expected weights of the types {', '.join(TYPES.values())}; got {name}")
    names = {id(parameter): name for name, parameter in llm.model.named_parameters()}
    tensors = _of_parts if llm.shape.has_parts else _of_whole_sites
    return {site: list(tensors(llm, site, names, by_parts)) for site in llm.shape.sites}


def _of_whole_sites(llm, site: Site, names: Mapping[int, str], _by_parts: bool) -> Iterator[Stored]:
    for parameter in llm.parameters_of(site):
        by_columns = parameter.ndim == 2 and not parameter.is_contiguous()
        shape, n_bytes = tuple(parameter.T.shape if by_columns else parameter.shape), parameter.nbytes
        spans = ((0, n_bytes),)
        yield Stored(names[id(parameter)], "", parameter, by_columns, spans, (n_bytes,), False, shape, n_bytes)


def _of_parts(llm, site: Site, names: Mapping[int, str], by_parts: bool) -> Iterator[Stored]:
    layer = llm.layer_of(site)
    cuts: list[Cut] = list(layer.cuts(site.kind).values())
    refitted = layer.output_path(site.kind) if llm.refits is not None else None
    for path, (dim, _own) in cuts[0].items():
        linear = layer.module.get_submodule(path)
        by_columns = dim == 1 and type(linear) is nn.Linear
        if by_columns and not linear.weight.T.is_contiguous():
            linear.weight.data = linear.weight.data.T.contiguous().T
        views = [cut_tensors(layer.module, path, dim, cut[path][1]) for cut in cuts]
        for key in views[0]:
            parameter, own = linear._parameters[key], [of_part[key] for of_part in views]
            spans = _spans(parameter, own)
            yield Stored(
                name=names[id(parameter)],
                path=path,
                parameter=parameter,
                by_columns=by_columns,
                spans=spans,
                part_bytes=tuple(view.nbytes for view in own),
                apart=spans is None or not by_parts or path == refitted,
                shape=tuple(parameter.T.shape if by_columns else parameter.shape),
                n_bytes=parameter.nbytes,
            )


def _spans(whole: torch.Tensor, views: Sequence[torch.Tensor]) -> tuple[Span, ...] | None:
    """Where views lie in a tensor, if each is one piece of it."""
    spans = []
    for view in views:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        if reach != view.numel():
            return None
        first = (view.storage_offset() - whole.storage_offset()) * whole.element_size()
        spans.append((first, first + view.nbytes))
    return tuple(spans)


def _joined(spans: Iterator[Span]) -> list[Span]:
    """Spans in their order; those that touch become one."""
    joined: list[Span] = []
    for first, end in spans:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, end))
    return joined
