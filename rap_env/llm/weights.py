"""The weight store: parts of a model leave memory and come back while it stays loaded."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from rap_env.components import Site
from rap_env.errors import UnsupportedArchitecture, WeightsReleased, WeightsUnavailable
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.embedded import cache_folder
from rap_env.llm.host_copies import HostCopies
from rap_env.llm.mapped_weights import MappedWeights
from rap_env.llm.prepared import Refit
from rap_env.llm.stored import Memory, Piece, stored_tensors
from rap_env.mask import PruningMask


class WeightStore:
    """Keeps the weights of some components of a model in memory, and those of the others out of it.

    On a CPU they are views of a mapped file, whose pages leave and come back (`MappedWeights`); for a GPU there is a
    copy in host memory (`HostCopies`). The model computes to the last bit what it did before. Embedding, head, norms
    and what a site has beside its parts stay in memory.

    While there is a store the model refuses to run what is not resident (`SwitchableLLM.check`). A forward that is
    running when its weights are released is not disturbed on a CPU: it reads the pages once more. They then stay in
    memory, and are not counted, until anything is released again.

    What leaves where a site keeps some of its parts, on a CPU:

    - The rows of matrices in any format, and output matrices in floating point, lie part by part in the file. Their
      whole pages leave. In bfloat16 all bytes of SmolLM2's parts are whole pages.
    - INT8 and INT4 output matrices, and the scales of INT4's inner ones, have the bytes of a part in many small pieces,
      as torch's kernels want them. The site runs with a copy of the kept ones, side by side, and the tensor itself
      leaves altogether. So do output matrices of models that have refits, which stand in for them.
    - Biases and INT8 scales of rows are smaller than a page for each part: those of dropped parts stay, unless the
      whole site is dropped.
    - Where the parts that a mask keeps don't lie side by side the site runs with copies of all its tensors. These are
      not counted.

    `freed_bytes` says how much this is.

    Args:
        llm: On a CPU or a GPU, with weights in any format. Where sites have parts, their output matrices in floating
            point are stored by columns, which changes the model's digest unless they were (`prepare_widths`).
        folder: For the file, which is as large as the weights and is written once for each digest and granularity; by
            default `weights` in the cache folder. Not used for a GPU.

    Attributes:
        memory: Where the weights are.
        resident: The components that can run.

    Raises:
        UnsupportedArchitecture: The model is on another device, or its weights are of a type that no file holds.
        WeightsUnavailable: The file can't be written; nothing of it stays, and the model goes on without a store.
    """

    def __init__(self, llm, folder: Path | None = None) -> None:
        self.memory = _memory_for(llm, folder or cache_folder() / "weights")
        llm.weights_changed()  # brings back what another store released
        self._stored = stored_tensors(llm, self.memory.by_parts)
        llm.weights_changed()  # output matrices may lie by columns now
        self.memory.take([one for of_site in self._stored.values() for one in of_site], llm.digest)
        self._lock, self._reader = threading.RLock(), ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._llm, self.resident = llm, PruningMask.all_kept(llm.shape)
        sites = llm.shape.components.sites
        self._positions = {(site.layer, site.kind): range(own.start, own.stop) for site, own in sites}
        llm.store = self

    @property
    def has_copies(self) -> bool:
        """Whether sites that keep the first of their parts run with copies of some tensors."""
        return any(one.apart for of_site in self._stored.values() for one in of_site)

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

    def narrowed(self, layer: DecoderLayer, site: Site, refit: Refit | None) -> DecoderLayer:
        """The layer of a site that runs with some of its parts; it needs nothing but their weights to be in memory.

        Args:
            layer: That has the whole site.
            site: With its parts.
            refit: What stands in for its output matrix; None for nothing.

        Raises:
            WeightsReleased: A part is not in memory.
            WeightsUnavailable: What has to be copied can't be read.
        """
        with self._lock:
            self.check_site(site)
            whole = Site(site.layer, site.kind)
            apart = [one for one in self._stored[whole] if one.apart]
            replaced = None if refit is None else layer.output_path(site.kind)
            readable = self.memory.readable(layer, apart, [one for one in apart if one.path != replaced])
            narrow = readable.narrowed(site.kind, site.parts, refit)
            places = {one.key for one in apart}
            if replaced is not None:  # its bias too: tensors of a refit keep its file in memory
                parameters = narrow.module.get_submodule(replaced)._parameters.items()
                places |= {(replaced, name) for name, tensor in parameters if tensor is not None}
            for path, name in places:
                own = narrow.module.get_submodule(path)._parameters
                own[name] = nn.Parameter(self.memory.copied(own[name].detach()), requires_grad=False)
            if apart:  # was read for the copies
                self.memory.release(self._pieces(self.resident, needed=False, of=[whole]))
            return narrow

    def switch(self, mask: PruningMask) -> None:
        """Applies a mask, with exactly its components in memory: what comes is read first, what goes leaves last.

        Raises what `restore` and `SwitchableLLM.apply` raise; then the mask that was applied stays, with its weights.
        """
        with self._lock:
            before = self.resident
            self.restore(mask)
            try:
                self._llm.apply(mask)
            except Exception:
                self.release(before)
                raise
            self.release(mask)

    def release(self, kept: PruningMask) -> None:
        """Lets go of all components but some.

        Args:
            kept: What stays; what is not in memory stays out of it.

        Raises:
            WeightsReleased: The mask that is applied needs what would go.
            WeightsUnavailable: The store is not the model's any more.
        """
        with self._lock:
            self._check_current()
            bits = tuple(keep and here for keep, here in zip(kept.keep, self.resident.keep, strict=True))
            after = PruningMask(kept.components, bits)
            _refuse_missing(self._llm.mask, after)
            self.resident = after  # before the weights go, so that nothing more begins to run on them
            self.memory.release(self._pieces(after, needed=False))

    def restore(self, mask: PruningMask) -> None:
        """Reads what a mask keeps and is not in memory.

        Raises:
            WeightsUnavailable: It can't be read, or the store is not the model's any more; what was in memory still is.
        """
        with self._lock:
            self._check_current()
            try:
                self._read(mask)
            except WeightsUnavailable:
                self.memory.release(self._pieces(self.resident, needed=False))
                raise
            self.resident = self._with(mask)

    def prefetch(self, mask: PruningMask) -> Future:
        """Begins to read what a mask keeps, in a thread of the store; a later `restore` finds it there.

        Returns:
            Done when all of it was read; raises what `restore` raises. If it fails, `restore` still reads for itself.

        Raises:
            WeightsUnavailable: The store is not the model's any more.
        """
        self._check_current()
        return self._reader.submit(self._read, mask)

    def close(self) -> None:
        """Has all weights in memory; raises what `restore` raises. The model does this before it is changed."""
        self.restore(PruningMask.all_kept(self._llm.shape))

    def freed_bytes(self, kept: PruningMask) -> int:
        """Bytes that leave memory where exactly some components stay: what the others weigh, but for what can't leave.

        Args:
            kept: What stays, and is applied. What a refit has beside its matrix, a bias or scales, is not counted.
        """
        freed = sum(map(self.memory.freed_bytes, self._pieces(kept, needed=False)))
        for site, bits in kept.kept_parts:
            if any(bits) and not all(bits):
                for one in self._stored[site]:
                    if one.apart:  # there is a copy of what is kept
                        freed -= sum(n_bytes for n_bytes, bit in zip(one.part_bytes, bits, strict=True) if bit)
        return freed

    def _with(self, mask: PruningMask) -> PruningMask:
        bits = tuple(keep or here for keep, here in zip(mask.keep, self.resident.keep, strict=True))
        return PruningMask(mask.components, bits)

    def _read(self, mask: PruningMask) -> None:
        after, here = self._with(mask), dict(self.resident.kept_parts)
        changed = [site for site, bits in after.kept_parts if bits != here[site]]
        self.memory.read(self._pieces(after, needed=True, of=changed))

    def _pieces(self, kept: PruningMask, needed: bool, of: Sequence[Site] | None = None) -> list[Piece]:
        """What has to be in memory for some components, or what has not; of some sites, or of all."""
        pieces: list[Piece] = []
        for site in self._stored if of is None else of:
            own = self._positions[site.layer, site.kind]
            bits = kept.keep[own.start : own.stop]
            for one in self._stored[site]:
                pieces += ((one, span) for span in (one.needed(bits) if needed else one.not_needed(bits)))
        return pieces

    def _check_current(self) -> None:
        if self._llm.store is not self:
            raise WeightsUnavailable(
                f"{self._llm.name} was changed, or has another store, since this one was made: make it anew"
            )


def _memory_for(llm, folder: Path) -> Memory:
    device: torch.device = llm.device
    if device.type == "cuda":
        return HostCopies(device)
    if device.type == "cpu":
        return MappedWeights(folder)
    raise UnsupportedArchitecture(f"expected a model on a CPU or a GPU of CUDA; {llm.name} is on {device}")


def _refuse_missing(needed: PruningMask, here: PruningMask) -> None:
    if needed.keep != here.keep:
        kept = zip(needed.components, needed.keep, here.keep, strict=True)
        if missing := [component.name for component, wanted, there in kept if wanted and not there]:
            raise WeightsReleased(missing)
