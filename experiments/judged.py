"""From policies to rows: what each decides in every scenario, judged."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rap_env.evaluation.perplexity import TextEvaluator
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario
from rap_env.policies import Policy, RetrievalPolicy
from rap_env.problem import PruningProblem


def judge(
    policies: Mapping[str, Policy],
    problem: PruningProblem,
    grid: Sequence[Scenario],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Lets every policy decide every scenario and judges the masks.

    A policy that retrieves by text decides for each window of a text by itself. It has no text to read in tasks, where
    its first archive decides.

    Returns:
        One JSON-able row for each policy and scenario; an evaluation by text has no smooth accuracy among its terms.
    """
    rows: list[dict[str, Any]] = []
    for name, policy in policies.items():
        by_text = isinstance(policy, RetrievalPolicy) and isinstance(problem.evaluator, TextEvaluator)
        of_policy = _rows_by_text(policy, problem, grid) if by_text else _rows(policy, problem, grid)
        rows += [{"policy": name} | row for row in of_policy]
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


def _rows_by_text(policy: RetrievalPolicy, problem: PruningProblem, grid: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Rows whose scores are means over the windows, each under the mask that its text retrieves.

    The components that a row says are dropped, and its footprint, are those of the largest footprint; `routes` has the
    masks of all, with the numbers of their windows.
    """
    nearest = policy.nearest(problem.llm.tokenizer.batch_decode(problem.evaluator.windows))
    numbers, n_windows = np.unique(nearest, return_counts=True)
    parts = [problem.judged_by(problem.evaluator.part(np.flatnonzero(nearest == number))) for number in numbers]
    routed = [_rows(policy.archives[number], part, grid) for number, part in zip(numbers, parts, strict=True)]
    problem.fresh_evaluations += sum(part.fresh_evaluations for part in parts)
    return [_merged(rows, n_windows, problem.evaluator) for rows in zip(*routed, strict=True)]


def _merged(rows: Sequence[dict[str, Any]], n_windows: Sequence[int], evaluator: TextEvaluator) -> dict[str, Any]:
    """One scenario's rows of all archives as one."""

    def mean(numbers: Sequence[float]) -> float:
        return float(np.average(numbers, weights=n_windows))

    score, largest = mean([row["score"] for row in rows]), max(rows, key=lambda row: row["footprint"]["peak_bytes"])
    return largest | {
        "score": score,
        "tasks": {evaluator.name: evaluator.metrics(-score) | {"items": int(sum(n_windows))}},
        "reward": mean([row["reward"] for row in rows]),
        "reward_terms": {term: mean([row["reward_terms"][term] for row in rows]) for term in largest["reward_terms"]},
        "violation": any(row["violation"] for row in rows),
        "routes": [[int(n), row["dropped"]] for n, row in zip(n_windows, rows, strict=True)],
    }
