"""Greedy Sequential Importance: remove the least harmful component, re-measure on the shrunk model, repeat."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rap_env.evaluation.store import ResultStore
from rap_env.importance.trials import RemovalMeter, Trial
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

# How much of the model's own rise in loss an old trial is expected to have followed. At 0 old trials are lower bounds:
# on SmolLM2-135M (2 x 256 tokens, 40 removals) 679 trials and next to no drift; at 1 there are 180, and losses up to 2%
# above the exact rule's after 12 removals; at 0.8 there are 298, and at most 0.6% up to 30 removals.
_TRUST = 0.8


@dataclass(frozen=True)
class ImportanceRanking:
    """Components from the least to the most important. Equality ignores what it cost.

    Attributes:
        order: Names of all components; the first `len(losses)` were removed in this order, the others follow by
            their last trial.
        losses: Calibration loss after each removal.
        dense_loss: Calibration loss of the dense model.
        evaluations: Trials that the rule asked for.
        tokens: Tokens of these trials.
        component_executions: Sub-blocks that were run for them when they were measured.
        seconds: Time that they took then.
    """

    order: tuple[str, ...]
    losses: tuple[float, ...]
    dense_loss: float
    evaluations: int
    tokens: int
    component_executions: int = field(compare=False)
    seconds: float = field(compare=False)


def greedy_sequential_importance(
    llm: SwitchableLLM,
    windows: torch.Tensor,
    removals: int | None = None,
    exact: bool = True,
    store: ResultStore | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportanceRanking:
    """Ranks components by greedy removal (RAP, arXiv 2505.17138; the same order as BlockPruner, arXiv 2406.10594).

    Each round removes the component whose absence gives the lowest loss. The exact rule tries every kept component in
    every round: n (n + 1) / 2 trials for a full ranking of n. The lazy rule trusts trials of earlier rounds, raised by
    what the model's own loss has risen since, and tries only what looks least important until something that was
    tried in this round does (as in Minoux's lazy greedy search).

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
        removals: Rounds; None removes everything. Components that are left are ranked by their last trials.
        exact: Whether every round tries every kept component; otherwise the lazy rule.
        store: Keeps finished trials; the same call goes on after a kill.
        progress: Called with (rounds done, rounds in all).
    """
    search = _GreedySearch(RemovalMeter(llm, windows, store))
    rounds = len(search.mask.keep) if removals is None else min(removals, len(search.mask.keep))
    dense_loss, order, losses = search.loss, [], []
    for index in range(rounds):
        order.append(search.remove_least_important(exact))
        losses.append(search.loss)
        progress(index + 1, rounds)
    return ImportanceRanking(
        order=(*order, *search.left()),
        losses=tuple(losses),
        dense_loss=dense_loss,
        evaluations=len(search.trials),
        tokens=len(search.trials) * search.meter.tokens_per_trial,
        component_executions=sum(trial.component_executions for trial in search.trials),
        seconds=sum(trial.seconds for trial in search.trials),
    )


class _GreedySearch:
    """The shrinking model of one greedy search, with the last trial of each component that is left."""

    def __init__(self, meter: RemovalMeter) -> None:
        self.meter = meter
        self.mask = PruningMask.all_kept(meter.llm.shape)
        self.loss = meter.trial(self.mask).loss
        self.trials: list[Trial] = []
        self._last: dict[str, tuple[float, float]] = {}  # name -> loss without it, the model's own loss at that time

    def remove_least_important(self, exact: bool) -> str:
        tried: set[str] = set()
        if exact or not self._last:
            for component in self.mask.kept:
                self._try(component.name)
            tried.update(self._last)
        while (name := min(self._last, key=self._expected_loss)) not in tried:
            self._try(name)
            tried.add(name)
        self.loss, _ = self._last.pop(name)
        self.mask = self.mask.drop(name)
        return name

    def left(self) -> list[str]:
        """Names of what was not removed, the least important first."""
        return sorted((component.name for component in self.mask.kept), key=self._expected_loss)

    def _try(self, name: str) -> None:
        trial = self.meter.trial(self.mask, self.mask.components[self.mask.position(name)])
        self.trials.append(trial)
        self._last[name] = trial.loss, self.loss

    def _expected_loss(self, name: str) -> float:
        if not self._last:
            return 0.0  # no round has been tried: nothing is known of anything
        loss, loss_then = self._last[name]
        return loss + _TRUST * (self.loss - loss_then)
