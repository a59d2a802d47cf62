"""What an environment stands on with `evaluation="table"`: scores that ship with the package, and no language model."""

import functools
from collections.abc import Sequence

import torch

from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.table import TableModel, load_tables
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from rap_env.memory.footprint import check_feasible, footprint
from rap_env.memory.workload import Workload
from rap_env.problem import ACCURACY_REWARD, Outcome, PruningProblem


class TableProblem(PruningProblem):
    """A problem whose masks a table knows: it remembers none, so that an environment may take millions of steps.

    Searches with a token budget take a `PruningProblem` over the same model; `with_budget` makes one.

    Args:
        model: Has the tables.
        reward_weights: As of `PruningProblem`.
    """

    llm: TableModel

    def __init__(self, model: TableModel, reward_weights=ACCURACY_REWARD) -> None:
        super().__init__(model, model.evaluator, reward_weights=reward_weights)

    def with_budget(self, budget: TokenBudget | None = None) -> PruningProblem:
        return PruningProblem(self.llm, self.evaluator, None, self.reward_weights, budget)

    @property
    def dense_score(self) -> float | None:
        return -self._dense_loss if self._is_relative else None

    @functools.cached_property
    def _dense_loss(self) -> float:
        return self.llm.evaluator.table.look_up([PruningMask.all_kept(self.shape)])[0][0]

    def evaluate_many(self, cases: Sequence[tuple[PruningMask, Workload, int]]) -> list[Outcome]:
        for mask, workload, budget_bytes in cases:
            check_feasible(self.shape, workload, budget_bytes)
            self.llm.check(mask)
        found = self.llm.evaluator.table.look_up([mask for mask, _workload, _budget_bytes in cases])
        dense = self.dense_score
        return [
            Outcome(
                self.llm.evaluator.evaluation(loss, is_measured),
                footprint(self.shape, mask, workload),
                int(budget_bytes),
                from_store=True,
                seconds=0.0,
                dense_score=dense,
            )
            for (mask, workload, budget_bytes), (loss, is_measured) in zip(cases, found, strict=True)
        ]


@functools.cache
def table_problem() -> TableProblem:
    """The embedded model's table; one for all of a process."""
    return TableProblem(load_tables())


@functools.cache
def table_importance() -> ImportanceSource:
    """The ranking of its components by the same table: what the greedy rule would remove is looked up."""
    model = table_problem().llm
    ranking = greedy_sequential_importance(model, torch.zeros(model.evaluator.table.about["windows"], dtype=torch.long))
    return ImportanceSource(ranking.order)
