"""Trials: what dropping one component of a masked model does to its calibration loss."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from rap_env.evaluation.perplexity import token_losses, tokens_digest
from rap_env.evaluation.store import ResultStore
from rap_env.importance.block_influence import block_influence
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import Component, PruningMask


class MaskStreams:
    """The residual stream in front of the kept components of a masked model, run no further than asked.

    Dropping component j leaves everything in front of j as it is, so a trial is the stream in front of j run through
    the components behind it: half of the work on average, and the same result to the bit. Streams are held in front
    of every component, or where fewer may be held, of every second, third, ...

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
        held_streams: Streams [N, T, H] that may be held, at least 1; None for as many as there are.
    """

    def __init__(self, llm: SwitchableLLM, windows: torch.Tensor, held_streams: int | None = None) -> None:
        n_streams = len(llm.shape.components) + 1
        self._llm, self._windows = llm, windows
        self._stride = math.ceil(n_streams / max(1, n_streams if held_streams is None else held_streams))
        embedded, self._context = llm.open_stream(windows)
        self._kept = llm.shape.components
        self._held = [embedded]  # in front of kept component 0, stride, 2 stride, ...

    def move_to(self, mask: PruningMask) -> None:
        """Turns to another mask and keeps the streams in front of the first component that differs."""
        shared = 0
        while shared < min(len(self._kept), len(mask.kept)) and self._kept[shared] == mask.kept[shared]:
            shared += 1
        self._kept = mask.kept
        del self._held[shared // self._stride + 1 :]

    def loss(self) -> float:
        """Loss of the present mask."""
        return self._loss(self._in_front_of(len(self._kept)))

    def loss_without(self, component: Component) -> float:
        """Loss of the present mask without one of its components."""
        position = self._kept.index(component)
        return self._loss(self._run(self._kept[position + 1 :], self._in_front_of(position)))

    def losses_of(self, masks: Sequence[PruningMask]) -> Iterator[tuple[PruningMask, float]]:
        """Losses of several distinct masks, whatever the present one is; the streams in front are shared, not held."""
        for mask, hidden in self._llm.run_masks(masks, self._held[0], self._context):
            yield mask, self._loss(hidden)

    def _in_front_of(self, position: int) -> torch.Tensor:
        while len(self._held) * self._stride <= position:
            first = (len(self._held) - 1) * self._stride
            self._held.append(self._run(self._kept[first : first + self._stride], self._held[-1]))
        nearest = position // self._stride
        return self._run(self._kept[nearest * self._stride : position], self._held[nearest])

    def _loss(self, hidden: torch.Tensor) -> float:
        return token_losses(self._llm, hidden, self._windows).mean().item()

    def _run(self, components: Sequence[Component], hidden: torch.Tensor) -> torch.Tensor:
        return self._llm.run(components, hidden, self._context)


@dataclass(frozen=True)
class Trial:
    """One measured loss.

    Attributes:
        loss: Calibration loss of the masked model.
        component_executions: Sub-blocks that were run for it.
        seconds: Time that it took.
    """

    loss: float
    component_executions: int = field(compare=False)
    seconds: float = field(compare=False)


class RemovalMeter:
    """Measures masked models on fixed calibration windows, each one once.

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
        store: Keeps every finished trial, so that a ranking that was cut off goes on where it stopped.
        held_streams: Streams in front of components that may be held; fewer cost time. None for as many as there are.
    """

    def __init__(
        self,
        llm: SwitchableLLM,
        windows: torch.Tensor,
        store: ResultStore | None = None,
        held_streams: int | None = None,
    ) -> None:
        self.llm = llm
        self.tokens_per_trial = windows.numel()
        self._windows = windows.to(llm.device)
        self._held_streams = held_streams
        self._store = store
        self._opened: MaskStreams | None = None
        self._identity = {
            "kind": "calibration loss",
            "model": llm.digest,
            "device": llm.device.type,
            "windows": tokens_digest(windows),
            "versions": {library: version(library) for library in ("torch", "transformers")},
        }

    def trial(self, mask: PruningMask, component: Component | None = None) -> Trial:
        """Loss of a masked model, without one more of its components if one is named."""
        judged = mask if component is None else mask.drop(component)
        stored = self._stored(judged)
        if stored is not None:
            return stored
        clock = _Clock(self.llm)
        self._streams.move_to(mask)
        loss = self._streams.loss() if component is None else self._streams.loss_without(component)
        return self._keep(judged, clock.trial(loss))

    def trials(self, mask: PruningMask) -> dict[str, Trial]:
        """Tries to drop each kept component of a masked model in turn, by name; all together share their streams."""
        without = {component.name: mask.drop(component) for component in mask.kept}
        measured = self.trials_of(list(without.values()))
        return {name: measured[judged] for name, judged in without.items()}

    def trials_of(self, masks: Sequence[PruningMask]) -> dict[PruningMask, Trial]:
        """Losses of several distinct masked models; all together share their streams."""
        known = {mask: self._stored(mask) for mask in masks}
        missing = [mask for mask, trial in known.items() if trial is None]
        clock = _Clock(self.llm)
        for mask, loss in self._streams.losses_of(missing) if missing else ():
            known[mask] = self._keep(mask, clock.trial(loss))
        return known

    def influences(self) -> dict[str, float]:
        """Block influence of every component of the dense model, by name; one forward without the head."""
        identity = self._identity | {"kind": "block influence"}
        stored = self._store.get(identity) if self._store else None
        if stored is None:
            components = self.llm.shape.components
            values = block_influence(self.llm, self._windows, [[component] for component in components])
            stored = {component.name: value for component, value in zip(components, values, strict=True)}
            if self._store:
                self._store.put(identity, stored)
        return stored

    @property
    def _streams(self) -> MaskStreams:
        if self._opened is None:  # not before something has to be measured
            self._opened = MaskStreams(self.llm, self._windows, self._held_streams)
        return self._opened

    def _stored(self, mask: PruningMask) -> Trial | None:
        stored = self._store.get(self._identity_of(mask)) if self._store else None
        return None if stored is None else Trial(**stored)

    def _keep(self, mask: PruningMask, trial: Trial) -> Trial:
        if self._store:
            self._store.put(self._identity_of(mask), vars(trial))
        return trial

    def _identity_of(self, mask: PruningMask) -> dict:
        return self._identity | {"dropped": [component.name for component in mask.dropped]}


class _Clock:
    """What has been spent since it was last asked."""

    def __init__(self, llm: SwitchableLLM) -> None:
        self._llm = llm
        self._executions, self._seconds = llm.component_executions, time.perf_counter()

    def trial(self, loss: float) -> Trial:
        executions, seconds = self._llm.component_executions, time.perf_counter()
        trial = Trial(loss, executions - self._executions, seconds - self._seconds)
        self._executions, self._seconds = executions, seconds
        return trial
