"""One entry of a comparison: an agent searches with one seed, and its policy decides every scenario."""

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from agents.base import Agent, SearchResult, Task
from experiments.build import Parts
from experiments.judged import judge
from rap_env.errors import InfeasibleBudget
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import Policy
from rap_env.problem import EvaluationBudget, PruningProblem

_DECISION_REPEATS = 5


class OrderedBudget(EvaluationBudget):
    """An evaluation budget that remembers the order in which it was spent.

    Attributes:
        masks: Distinct masks, in the order in which they were asked about.
        largest_batch: The most of them that were asked about at once.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(limit)
        self.masks: list[PruningMask] = []
        self.largest_batch = 0

    def spend(self, masks: Iterable[PruningMask]) -> None:
        masks = list(masks)
        new = {mask.digest: mask for mask in masks if mask.digest not in self.asked}
        super().spend(masks)
        self.masks += new.values()
        self.largest_batch = max(self.largest_batch, len(new))


def measure(agent: Agent, task: Task, parts: Parts, judges: dict[str, PruningProblem], decisions: int) -> dict:
    """Lets an agent search, and its policy decide.

    Args:
        agent: Who searches.
        task: Its problem counts with an `OrderedBudget` that nothing else has spent of.
        parts: What the comparison stands on.
        judges: Judge the policy's masks for the report, by name.
        decisions: Random scenarios of the sampler in which violations are counted.

    Returns:
        The results of its record: see README, "Compare policies".
    """
    result = agent.search(task)
    policy, budget = result.policy, task.problem.budget
    referee = parts.search.with_budget()
    case = parts.grid[0]
    dense = (PruningMask.all_kept(referee.shape), case.workload, case.budget_bytes)
    best = best_so_far(budget.masks, task.problem, parts.grid)
    return {
        "components": [component.name for component in referee.shape.components],
        "judges": list(judges),
        "dense": {name: problem.evaluate(*dense).score for name, problem in ({"search": referee} | judges).items()},
        "ranking": {name: getattr(parts.ranking, name) for name in ("evaluations", "tokens", "seconds")},
        "search": _search_cost(result, task.problem, budget),
        "anytime": anytime(best),
        "rows": _rows(policy, referee, judges, parts.grid, best),
        "unseen": {"decisions": decisions, "violations": count_violations(policy, parts.sampler, decisions)},
    }


def _search_cost(result: SearchResult, problem: PruningProblem, budget: OrderedBudget) -> dict[str, Any]:
    """What the search took; bytes are predicted, and count the dense weights and the judging beside them."""
    weights_bytes = footprint(problem.shape, PruningMask.all_kept(problem.shape), Workload(1, 1)).weights_bytes
    judging_bytes = problem.evaluator.peak_bytes(problem.llm, budget.largest_batch) if budget.masks else 0
    return {
        "evaluations": budget.spent,
        "fresh_evaluations": problem.fresh_evaluations,
        "calibration_tokens": result.calibration_tokens,
        "seconds": result.seconds,
        "peak_bytes": weights_bytes + judging_bytes,
        "details": result.details,
    }


def best_so_far(masks: Sequence[PruningMask], problem: PruningProblem, grid: Sequence[Scenario]) -> np.ndarray:
    """The best score among the first masks that fit, [masks, scenarios]; minus infinity until one fits."""
    if not masks:
        return np.empty((0, len(grid)))
    cases = [[(mask, scenario.workload, scenario.budget_bytes) for scenario in grid] for mask in masks]
    outcomes = [problem.evaluate_many(of_mask) for of_mask in cases]
    scores = [[outcome.score if outcome.fits else -np.inf for outcome in of_mask] for of_mask in outcomes]
    return np.maximum.accumulate(np.array(scores), axis=0)


def anytime(best: np.ndarray) -> list[list[float]]:
    """Where the mean over the scenarios of the best score so far changes: [evaluations, mean score].

    It begins when every scenario has a mask that fits, and ends with the last evaluation.
    """
    means = best.mean(axis=1)
    last = len(means) - 1
    return [
        [index + 1, float(mean)]
        for index, mean in enumerate(means)
        if np.isfinite(mean) and (index in (0, last) or mean > means[index - 1])
    ]


def _rows(
    policy: Policy,
    referee: PruningProblem,
    judges: dict[str, PruningProblem],
    grid: Sequence[Scenario],
    best: np.ndarray,
) -> list[dict[str, Any]]:
    """A row for each scenario: `score` and `tasks` of the search half, and those of every judge in `reports`."""
    rows = judge({"": policy}, referee, grid)
    reports = {name: judge({"": policy}, problem, grid) for name, problem in judges.items()}
    for index, (row, scenario) in enumerate(zip(rows, grid, strict=True)):
        del row["policy"]
        asked = float(best[-1, index]) if len(best) else -np.inf
        row["best_asked"] = asked if np.isfinite(asked) else None
        row["decision_milliseconds"] = _decision_milliseconds(policy, scenario)
        row["reports"] = {name: {key: of[index][key] for key in ("score", "tasks")} for name, of in reports.items()}
    return rows


def _decision_milliseconds(policy: Policy, scenario: Scenario) -> float:
    seconds = []
    for _repeat in range(_DECISION_REPEATS):
        started = time.perf_counter()
        policy.decide(scenario.workload, scenario.budget_bytes)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def count_violations(policy: Policy, sampler, decisions: int) -> int:
    """In how many random scenarios, the same for every policy, a policy's mask does not fit, or it has none."""
    generator, violations = np.random.default_rng(0), 0
    for _decision in range(decisions):
        scenario = sampler.sample(policy.shape, generator)
        try:
            mask = policy.decide(scenario.workload, scenario.budget_bytes)
        except InfeasibleBudget:
            violations += 1
        else:
            violations += footprint(policy.shape, mask, scenario.workload).peak_bytes > scenario.budget_bytes
    return violations
