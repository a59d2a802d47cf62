"""From policies to rows: what each decides in every scenario, judged."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario
from rap_env.policies import Policy
from rap_env.problem import PruningProblem


def judge(
    policies: Mapping[str, Policy],
    problem: PruningProblem,
    grid: Sequence[Scenario],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Lets every policy decide every scenario and judges the masks.

    Returns:
        One JSON-able row for each policy and scenario; an evaluation by text has no smooth accuracy among its terms.
    """
    rows: list[dict[str, Any]] = []
    for name, policy in policies.items():
        rows += [{"policy": name} | row for row in _rows(policy, problem, grid)]
        progress(len(rows), len(policies) * len(grid))
    return rows


def _rows(policy: Policy, problem: PruningProblem, grid: Sequence[Scenario]) -> list[dict[str, Any]]:
    cases = [(policy.decide(s.workload, s.budget_bytes), s.workload, s.budget_bytes) for s in grid]
    outcomes = problem.evaluate_many(cases)
    return [
        {
            "batch_size": workload.batch_size,
            "prompt_tokens": workload.prompt_tokens,
            "generated_tokens": workload.generated_tokens,
            "budget_bytes": budget_bytes,
            "budget_ratio": budget_bytes / dense_bytes(problem.shape, workload),
            "footprint": outcome.footprint.as_dict(),
            "score": outcome.score,
            "tasks": outcome.evaluation.tasks,
            "reward": problem.reward(outcome),
            "reward_terms": {term: value for term, value in outcome.reward_terms.items() if math.isfinite(value)},
            "violation": not outcome.fits,
            "dropped": [component.name for component in mask.dropped],
        }
        for (mask, workload, budget_bytes), outcome in zip(cases, outcomes, strict=True)
    ]
