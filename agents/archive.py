"""Local search: the greedy walk first, then swaps in the best masks known."""

from collections.abc import Sequence

import numpy as np

from agents.base import ArchiveAgent, Case, Task
from agents.granularity import parts_to_move
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.policies.walk import fit_to_budget

BATCH = 16  # proposals that are evaluated together, between two looks at the archive
_MOST_DRAWN = 512  # scenarios for the first batch: an order has few masks


class LocalSearchAgent(ArchiveAgent):
    """What remembering alone achieves with the tokens that a learned agent gets.

    First come the ranking's masks for the search scenarios, and for as many drawn ones as a quarter of the evaluations.
    Then each batch takes scenarios from the sampler and from the search by turns, and swaps a kept component for a
    dropped one in the best known mask that fits each.

    Args:
        fill: See `ArchivePolicy`.

    Attributes:
        walk_part: Scenarios drawn for the first batch, as a part of the evaluations.
    """

    walk_part = 0.25

    def __init__(self, fill: bool = False) -> None:
        self.fill = fill

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._walked = False

    def ask(self, n: int) -> list[Case]:
        if self._walked:
            return self.propose()
        self._walked = True
        scenarios = [*self.task.scenarios, *(self.draw() for _ in range(min(_MOST_DRAWN, int(self.walk_part * n))))]
        walks = self.walks()
        cases = [Case(walk.decide(one.workload, one.budget_bytes), one) for one in scenarios for walk in walks]
        return cases or self.propose()

    def propose(self) -> list[Case]:
        """The next batch."""
        best, scenarios = self.best(), self.task.scenarios
        cases = []
        for turn in range(BATCH):
            scenario = self.draw()
            if turn % 2 and scenarios:
                scenario = scenarios[self.generator.integers(len(scenarios))]
            parent = best.decide(scenario.workload, scenario.budget_bytes)
            swapped = swap_one(parent, scenario, self.task.problem.shape, self.order, self.generator)
            cases.append(Case(swapped, scenario))
        return cases

    def draw(self) -> Scenario:
        """A scenario from the sampler."""
        return self.task.sampler.sample(self.task.problem.shape, self.generator)


def swap_one(
    mask: PruningMask, scenario: Scenario, shape, order: Sequence[str], generator: np.random.Generator
) -> PruningMask:
    """A neighbour that fits: a random kept component goes, a random dropped one comes.

    Where sites have parts, the last that a site keeps go and the first that it dropped come, up to an eighth of all.
    Where their bytes differ, further components go or come along the order; those that went come back last.

    Args:
        mask: Fits the scenario. Where it keeps or drops everything there is nothing to swap, and it comes back itself.
        scenario: What the neighbour has to fit.
        shape: The model.
        order: All component names, the first to go first.
        generator: Draws the two.
    """
    if not mask.kept or not mask.dropped:
        return mask
    going, coming = (group[generator.integers(len(group))].site for group in (mask.kept, mask.dropped))
    if going == coming:  # as many parts come as go
        return mask
    n_going, n_coming = (
        parts_to_move(len(mask.components.positions[site.name]), generator) for site in (going, coming)
    )
    going = [c.name for c in mask.kept if c.site == going][::-1][:n_going]
    coming = [c.name for c in mask.dropped if c.site == coming][:n_coming]
    moved = {*going, *coming}
    between = (name for name in order if name not in moved)
    swapped, order = mask.drop(*going).restore(*coming), [*going, *between, *reversed(coming)]
    # What goes comes back last, so that others of its site may have come back before it.
    return fit_to_budget(swapped, shape, order, scenario.workload, scenario.budget_bytes).nested
