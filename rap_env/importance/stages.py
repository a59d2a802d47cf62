"""Greedy removal where sites have parts: in stages, each of which removes the cheapest steps of many sites at once."""

import math
from collections import deque
from collections.abc import Mapping

from rap_env.components import Component
from rap_env.evaluation.meter import Meter
from rap_env.importance.rounds import Removal, Rounds, price

_STEP = 0.25  # part of a site's parts that are tried, and go, together
_MEASURED = 0.5  # part of the steps that a later stage measures again: those that were cheapest
_REMOVED = 1 / 3  # part of all steps that a stage removes
_GROWTH = 2.0  # of a step's cost from one step of a site to the next, where it was not measured
_ENOUGH = 0.5  # part of all that can be freed after which nothing is measured any more


class StagedRounds(Rounds):
    """Removes steps, the last quarter of a site's parts or what is left of it, by loss increase for what they free.

    The first stage measures the next step of every site on the dense model, and each later one the cheaper half of the
    steps again on the model that is left. A stage removes a third of the steps, the cheapest of those that it measured.
    When half is freed the rest follows by what was measured last. For 30 layers these are about 220 evaluations; the
    exact rule over their 810 parts would take 328,455.

    Args:
        meter: Measures on all windows.
        freed: What dropping each component is worth.
    """

    def __init__(self, meter: Meter, *, freed: Mapping[str, int]) -> None:
        super().__init__(meter.llm.shape, freed)
        self._meter = meter
        self.loss = self.known[self.mask] = -meter.evaluate([self.mask])[0].score
        self._size = {site: math.ceil(_STEP * len(bits)) for site, bits in self.mask.kept_parts}
        self.costs: dict[str, float] = {}
        self._waiting: deque[str] = deque()
        self._prices: dict[str, float] = {}  # of the next step of each site, by the site's name

    def remove_least_important(self) -> Removal:
        """The next part; all that go in one stage have the loss after the stage."""
        if not self._waiting:
            self._play_stage()
        return Removal(self._waiting.popleft(), self.loss)

    def all_costs(self) -> dict[str, float]:
        """By how much the loss rose without each part when it was measured last, at least 0.

        A part that never was costs twice what the part that goes before it does, for losses rise ever faster.
        """
        costs, before = {}, {}
        for component in reversed(self.mask.components):
            known = self.costs.get(component.name)
            if known is None:
                known = _GROWTH ** (1 / self._size[component.site]) * before[component.site]
            costs[component.name] = before[component.site] = max(known, 0.0)
        return costs

    def left(self) -> list[str]:
        """Names of what was not removed: first what the last stage still held, then all others."""
        return [*self._waiting, *super().left()]

    def _play_stage(self) -> None:
        steps = self._steps()
        worth = sum(self._freed.values())
        if sum(self._freed[component.name] for component in self.mask.dropped) < _ENOUGH * worth:
            measured = self._measure(steps)
            n_removed = max(1, round(_REMOVED * len(steps)))
        else:
            measured, n_removed = list(steps), len(steps)
        cheapest = sorted(measured, key=self._prices.__getitem__)[:n_removed]
        self._waiting += (component.name for site in cheapest for component in reversed(steps[site]))
        self.mask = self.mask.drop(*self._waiting)
        if n_removed < len(steps):
            self.loss = self.known[self.mask] = -self._meter.evaluate([self.mask])[0].score

    def _steps(self) -> dict[str, list[Component]]:
        """The next step of each site that keeps any part, by the site's name."""
        kept: dict[str, list[Component]] = {}
        for component in self.mask.kept:
            kept.setdefault(component.site.name, []).append(component)
        return {name: parts[-self._size[parts[0].site] :] for name, parts in kept.items()}

    def _measure(self, steps: Mapping[str, list[Component]]) -> list[str]:
        """Measures the steps that were cheapest, the first time all, and returns their sites' names."""
        known = sorted((name for name in steps if name in self._prices), key=self._prices.__getitem__)
        names = known[: math.ceil(_MEASURED * len(known))] or list(steps)
        masks = {name: self.mask.drop(*steps[name]) for name in names}
        evaluated = self._meter.evaluate(list(masks.values()), near=self.mask)
        self.tried.update(masks.values())
        for name, evaluation in zip(masks, evaluated, strict=True):
            freed = sum(self._freed[component.name] for component in steps[name])
            loss = self.known[masks[name]] = -evaluation.score
            self._prices[name] = price(loss - self.loss, freed)
            for component in steps[name]:
                self.increases[component.name] = (loss - self.loss) * self._freed[component.name] / freed
        self.costs |= self.increases
        self.first_increases = self.first_increases or dict(self.increases)
        return names
