"""Greedy Sequential Importance: remove the least harmful component, re-measure on the shrunk model, repeat."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from rap_env.evaluation.perplexity import stream_loss, tokens_digest
from rap_env.evaluation.store import ResultStore
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


@dataclass(frozen=True)
class Trials:
    """What dropping each kept component of one model would cost.

    Attributes:
        losses: Calibration loss after dropping the component, by its name.
        tokens: Tokens that were forwarded, each trial counted in full.
        component_executions: Sub-blocks that were run; the stored stream in front of a trial is not run again.
        seconds: Wall-clock time.
    """

    losses: dict[str, float]
    tokens: int
    component_executions: int
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class ImportanceRanking:
    """Components from the least to the most important. Equality ignores the time it took.

    Attributes:
        order: Names of all components; the first `len(losses)` were removed in this order, the others follow by
            their last trial.
        losses: Calibration loss after each removal.
        dense_loss: Calibration loss of the dense model.
        evaluations: Trials that were measured.
        tokens: Tokens of all trials.
        component_executions: Sub-blocks that were run for them.
        seconds: Time that the trials took when they were measured.
    """

    order: tuple[str, ...]
    losses: tuple[float, ...]
    dense_loss: float
    evaluations: int
    tokens: int
    component_executions: int
    seconds: float = field(compare=False)


class RemovalMeter:
    """Measures trials on fixed calibration windows, each masked model once.

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
        store: Keeps every finished round, so that a ranking that was cut off goes on where it stopped.
    """

    def __init__(self, llm: SwitchableLLM, windows: torch.Tensor, store: ResultStore | None = None) -> None:
        self.llm = llm
        self._windows = windows.to(llm.device)
        self._store = store
        self._identity = {
            "kind": "removal trials",
            "model": llm.digest,
            "device": llm.device.type,
            "windows": tokens_digest(windows),
            "versions": {library: version(library) for library in ("torch", "transformers")},
        }

    def trials(self, mask: PruningMask) -> Trials:
        """Tries to drop each kept component of a masked model in turn."""
        identity = self._identity | {"dropped": [component.name for component in mask.dropped]}
        stored = self._store.get(identity) if self._store else None
        if stored is None:
            stored = self._measure(mask)
            if self._store:
                self._store.put(identity, stored)
        return Trials(**stored)

    @torch.inference_mode()
    def _measure(self, mask: PruningMask) -> dict:
        started = time.perf_counter()
        kept, losses = mask.kept, {}
        hidden, context = self.llm.open_stream(self._windows)
        for position, component in enumerate(kept):
            behind = kept[position + 1 :]
            losses[component.name] = stream_loss(self.llm, self.llm.run(behind, hidden, context), self._windows)
            hidden = self.llm.run([component], hidden, context)
        return {
            "losses": losses,
            "tokens": self._windows.numel() * len(kept),
            "component_executions": len(kept) * (len(kept) + 1) // 2,
            "seconds": time.perf_counter() - started,
        }

    @torch.inference_mode()
    def loss(self, mask: PruningMask) -> float:
        """Calibration loss of a masked model."""
        hidden, context = self.llm.open_stream(self._windows)
        return stream_loss(self.llm, self.llm.run(mask.kept, hidden, context), self._windows)


def greedy_sequential_importance(
    llm: SwitchableLLM,
    windows: torch.Tensor,
    removals: int | None = None,
    store: ResultStore | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportanceRanking:
    """Ranks components by greedy removal (RAP, arXiv 2505.17138; the same order as BlockPruner, arXiv 2406.10594).

    Each round tries every kept component on the shrunk model and removes the one whose absence gives the lowest
    loss. A full ranking of n components takes n (n + 1) / 2 trials; a trial starts from the stream in front of its
    component, which halves the work and changes no result.

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
        removals: Rounds; None removes everything. Components that are left are ranked by the last round's trials.
        store: Keeps finished rounds; the same call goes on after a kill.
        progress: Called with (rounds done, rounds in all).
    """
    meter = RemovalMeter(llm, windows, store)
    mask = PruningMask.all_kept(llm.shape)
    dense_loss = meter.loss(mask)
    rounds = len(mask.keep) if removals is None else min(removals, len(mask.keep))
    order, losses, done = [], [], []
    for index in range(rounds):
        trials = meter.trials(mask)
        victim = min(trials.losses, key=trials.losses.__getitem__)
        order.append(victim)
        losses.append(trials.losses[victim])
        done.append(trials)
        mask = mask.drop(victim)
        progress(index + 1, rounds)
    left = [component.name for component in mask.kept]
    if done:
        left.sort(key=done[-1].losses.__getitem__)
    return ImportanceRanking(
        order=(*order, *left),
        losses=tuple(losses),
        dense_loss=dense_loss,
        evaluations=sum(len(trials.losses) for trials in done),
        tokens=sum(trials.tokens for trials in done),
        component_executions=sum(trials.component_executions for trials in done),
        seconds=sum(trials.seconds for trials in done),
    )
