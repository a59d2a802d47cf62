"""Trials: what dropping one component of a masked model does to its calibration loss."""

import time
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from rap_env.evaluation.perplexity import stream_loss, tokens_digest
from rap_env.evaluation.store import ResultStore
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import Component, PruningMask


class MaskStreams:
    """The residual stream in front of every kept component of a masked model, run no further than asked.

    Dropping component j leaves everything in front of j as it is, so a trial is the stored stream in front of j run
    through the components behind it: half of the work on average, and the same result to the bit. It costs one stream
    [N, T, H] of memory for each kept component.

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
    """

    def __init__(self, llm: SwitchableLLM, windows: torch.Tensor) -> None:
        self._llm, self._windows = llm, windows
        embedded, self._context = llm.open_stream(windows)
        self._kept = llm.shape.components
        self._streams = [embedded]
        self.component_executions = 0

    def move_to(self, mask: PruningMask) -> None:
        """Turns to another mask and keeps the streams in front of the first component that differs."""
        shared = 0
        while shared < min(len(self._kept), len(mask.kept)) and self._kept[shared] == mask.kept[shared]:
            shared += 1
        self._kept = mask.kept
        del self._streams[shared + 1 :]

    def loss_without(self, component: Component) -> float:
        """Loss of the present mask without one of its components."""
        position = self._kept.index(component)
        return self._loss(self._in_front_of(position), self._kept[position + 1 :])

    def loss(self) -> float:
        """Loss of the present mask."""
        return self._loss(self._in_front_of(len(self._kept)), ())

    def _in_front_of(self, position: int) -> torch.Tensor:
        while len(self._streams) <= position:
            component = self._kept[len(self._streams) - 1]
            self._streams.append(self._run([component], self._streams[-1]))
        return self._streams[position]

    def _loss(self, hidden: torch.Tensor, components: tuple[Component, ...]) -> float:
        return stream_loss(self._llm, self._run(components, hidden), self._windows)

    def _run(self, components, hidden: torch.Tensor) -> torch.Tensor:
        self.component_executions += len(components)
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
    """

    def __init__(self, llm: SwitchableLLM, windows: torch.Tensor, store: ResultStore | None = None) -> None:
        self.llm = llm
        self.tokens_per_trial = windows.numel()
        self._windows = windows.to(llm.device)
        self._store = store
        self._streams: MaskStreams | None = None
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
        identity = self._identity | {"dropped": [dropped.name for dropped in judged.dropped]}
        stored = self._store.get(identity) if self._store else None
        if stored is None:
            stored = self._measure(mask, component)
            if self._store:
                self._store.put(identity, stored)
        return Trial(**stored)

    def trials(self, mask: PruningMask) -> dict[str, Trial]:
        """Tries to drop each kept component of a masked model in turn, by name."""
        return {component.name: self.trial(mask, component) for component in mask.kept}

    @torch.inference_mode()
    def _measure(self, mask: PruningMask, component: Component | None) -> dict:
        started = time.perf_counter()
        if self._streams is None:
            self._streams = MaskStreams(self.llm, self._windows)
        streams = self._streams
        streams.move_to(mask)
        before = streams.component_executions
        loss = streams.loss() if component is None else streams.loss_without(component)
        return {
            "loss": loss,
            "component_executions": streams.component_executions - before,
            "seconds": time.perf_counter() - started,
        }
