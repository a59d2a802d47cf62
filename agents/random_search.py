"""Random search: random masks that fit are evaluated, and the best of them remembered."""

from agents.base import ArchiveAgent, Case
from rap_env.mask import PruningMask
from rap_env.policies.walk import fit_to_budget


class RandomSearchAgent(ArchiveAgent):
    """Drops components in random orders; every batch holds one mask for each search scenario.

    So the scenarios share the evaluations evenly. Budgets that no evaluated mask fits are served by a random order too:
    the search knows nothing of importance.
    """

    ranked = False

    def ask(self, n: int) -> list[Case]:
        shape = self.task.problem.shape
        dense = PruningMask.all_kept(shape)
        return [
            Case(fit_to_budget(dense, shape, self.random_order(), scenario.workload, scenario.budget_bytes), scenario)
            for scenario in self.task.scenarios
        ]
