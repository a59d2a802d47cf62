"""What searches for one scenario after another share: equal parts of the tokens, and an archive at the end."""

from collections import deque
from collections.abc import Generator, Sequence

import numpy as np

from agents.base import ArchiveAgent, Case, Evaluated, Task
from agents.granularity import GRANULARITIES, Granularity, distinct_searches
from rap_env.errors import check_known
from rap_env.importance.site_curves import measure_site_curves
from rap_env.mask import PruningMask
from rap_env.policies import PricedPolicy

STARTS = ("random", "greedy", "uniform", "single_sites")
_LEVELS = 4  # of the curves of single sites
Evolution = Generator[list[PruningMask], list[float], None]


class ScenarioAgent(ArchiveAgent):
    """Searches for one scenario after another, each with an equal share of the tokens that are left.

    Every mask that it proposes fits, so that its reward does not depend on the scenario; what the archive knows is
    neither proposed nor paid for again.

    Args:
        granularity: `"component"` (a bit for each, masks that fit the bytes), `"layer"` (whole layers, as many as it
            takes) or `"equal_counts"` (as many attentions as MLPs).
        start: `"random"` masks, which need no ranking, `"greedy"`, the ranking's, or `"uniform"`, the same part of each
            site, which needs none either, or `"single_sites"`: the greedy walk along curves of single sites, which are
            measured on the search half, with more than two widths only if one evaluation for each scenario is left.
        fill: See `ArchivePolicy`.

    Raises:
        UnknownName: No such granularity or start.
    """

    def __init__(self, granularity: str, start: str, fill: bool = False) -> None:
        self._granularity = check_known("granularity", granularity, GRANULARITIES)
        self._start = check_known("start", start, STARTS)
        self.ranked, self.fill = start == "greedy", fill

    def first_order(self) -> Sequence[str]:
        if self._start != "single_sites":
            return super().first_order()
        shape, scenarios = self.task.problem.shape, self.task.scenarios
        curves = measure_site_curves(self.task.problem.meter, _LEVELS, reserve=len(scenarios))
        self._priced = PricedPolicy(shape, curves.costs)
        return self._priced.order(scenarios[len(scenarios) // 2].workload) if scenarios else self.random_order()

    def started(self, space: Granularity) -> list[np.ndarray]:
        """What a search begins with, vectors [n_bits]; none where it is to draw that."""
        if self._start == "random":
            return []
        if self._start == "uniform":
            return [space.uniform()]
        scenario = space.scenario
        if not self.ranked:
            return [space.bits_of(self._priced.decide(scenario.workload, scenario.budget_bytes))]
        _order, *others = self.walks()
        masks = [walk.decide(scenario.workload, scenario.budget_bytes) for walk in others]
        return [space.greedy(self.order), *(space.bits_of(mask) for mask in masks)]

    def evolve(self, space: Granularity) -> Evolution:
        """One search: yields masks and receives their rewards; it is closed where its share does not pay for all."""
        raise NotImplementedError

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._spaces = deque(distinct_searches(self._granularity, task.problem.shape, task.scenarios))
        self._evolution: Evolution | None = None
        self._members: list[PruningMask] = []
        self._waiting = False
        self.details["searches"] = len(self._spaces)

    @property
    def share_left(self) -> float:
        """Tokens that the present search may still spend."""
        return self._share_ends - self.task.problem.budget.spent

    def ask(self, n: int) -> list[Case]:
        while not self._waiting and (self._evolution or self._spaces):
            if self._evolution is None:
                budget, self._space = self.task.problem.budget, self._spaces.popleft()
                self._share_ends = budget.spent + budget.left / (1 + len(self._spaces))
                self._evolution = self.evolve(self._space)
                self._go_on(None)
                continue
            new = [mask for mask in dict.fromkeys(self._members) if mask not in self.task.archive]
            paid = new[: max(0, int(self.share_left // self.task.problem.meter.tokens_each))]
            if paid:
                self._waiting = True
                return [Case(mask, self._space.scenario) for mask in paid]
            if new:
                self._evolution = None
            else:
                self._go_on([self.task.archive[mask] for mask in self._members])
        return []

    def tell(self, evaluated: Sequence[Evaluated]) -> None:
        self._waiting = False

    def _go_on(self, rewards: list[float] | None) -> None:
        try:
            self._members = self._evolution.send(rewards)
        except StopIteration:
            self._evolution = None
