"""Cheap-to-dear selection: many masks on few items, the best of them on more."""

from collections.abc import Sequence
from dataclasses import dataclass

from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.problem import Outcome, PruningProblem


@dataclass(frozen=True)
class Stage:
    """One round of a selection.

    Attributes:
        problem: Judges this round's masks; its own evaluation budget counts them, so that cheap rounds are not hidden.
        survivors: How many of them go on, at least 1.
    """

    problem: PruningProblem
    survivors: int

    def __post_init__(self) -> None:
        if self.survivors < 1:
            raise ValueError(f"expected a stage with at least 1 survivor; got {self.survivors}")


def select_in_stages(
    stages: Sequence[Stage], masks: Sequence[PruningMask], workload: Workload, budget_bytes: int
) -> list[tuple[PruningMask, Outcome]]:
    """Judges all masks in the first stage, its survivors in the second, and so on, as EvoPress does (arXiv 2410.14649).

    The stages' problems usually differ in their evaluator's `limit`. A mask that few items misjudge is lost, so what
    the last stage says of the survivors is exact, and that they are the best is not.

    Args:
        stages: From cheap to dear.
        masks: Candidates.
        workload: The request batch.
        budget_bytes: Memory budget.

    Returns:
        The last stage's survivors with their outcomes, the highest reward first; of equal ones the earlier candidate.

    Raises:
        ValueError: There is no stage.
        RapError: Whatever `PruningProblem.evaluate_many` raises.
    """
    if not stages:
        raise ValueError("expected at least one stage; got none")
    candidates = list(dict.fromkeys(masks))
    for stage in stages:
        outcomes = stage.problem.evaluate_many([(mask, workload, budget_bytes) for mask in candidates])
        ranked = sorted(
            zip(candidates, outcomes, strict=True), key=lambda judged: stage.problem.reward(judged[1]), reverse=True
        )[: stage.survivors]
        candidates = [mask for mask, _outcome in ranked]
    return ranked
