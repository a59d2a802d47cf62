"""From what an agent's search ended as to the results of its record."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agents.base import Task
from agents.driver import SearchResult, evaluated_masks
from experiments.recipes.build import Parts
from rap_env.errors import InfeasibleBudget
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.policies import DensePolicy, OrderPolicy, Policy, RandomPolicy
from rap_env.problem import Outcome, PruningProblem

_DECISION_REPEATS = 5


def measure(result: SearchResult, task: Task, parts: Parts, decisions: int) -> dict[str, Any]:
    """Lets the policy decide the scenarios, evaluates its masks on both halves, and tells what the search cost.

    Args:
        result: What the search ended as.
        task: The searched one.
        parts: What the run stands on.
        decisions: Random scenarios of the sampler in which violations are counted.

    Returns:
        The results of a record.
    """
    policy, problem, main = result.policy, task.problem, next(iter(parts.reports))
    best = best_so_far([mask for mask, _spent in evaluated_masks(task)], problem, parts.reported)
    dense, problems = PruningMask.all_kept(problem.shape), {"search": parts.search, **parts.reports}
    return {
        "objective": objective(policy, parts.search, parts.searched),
        "components": [component.name for component in problem.shape.components],
        "evaluators": list(parts.reports),
        "dense": {name: each.meter.evaluate([dense])[0].score for name, each in problems.items()},
        "search": _cost(result, task),
        "anytime": anytime(best, [spent for _mask, spent in evaluated_masks(task)]),
        "rows": rows(policy, parts.search, parts.reports, parts.reported, best),
        "references": {
            name: rows(other, parts.search, {main: parts.reports[main]}, parts.reported)
            for name, other in _references(task).items()
        },
        "held_out": {"decisions": decisions, "violations": count_violations(policy, parts.sampler, decisions)},
        **parts.counts,
    }


def objective(policy: Policy, search: PruningProblem, scenarios: Sequence[Scenario]) -> float:
    """Mean reward on the search half: what sweeps over hyperparameters may look at."""
    return statistics.mean(search.reward(outcome) for _mask, outcome in _decided(policy, search, scenarios))


def _decided(
    policy: Policy, problem: PruningProblem, scenarios: Sequence[Scenario]
) -> list[tuple[PruningMask, Outcome]]:
    masks = [policy.decide(scenario.workload, scenario.budget_bytes) for scenario in scenarios]
    cases = [(mask, each.workload, each.budget_bytes) for mask, each in zip(masks, scenarios, strict=True)]
    return list(zip(masks, problem.evaluate_many(cases), strict=True))


def _cost(result: SearchResult, task: Task) -> dict[str, Any]:
    """What the search took: tokens as it was charged, seconds as they were measured, whoever measured them."""
    meter, history = task.problem.meter, task.problem.budget.history
    seconds = [meter.known[mask].seconds for mask, _spent in evaluated_masks(task)]
    if "ranking" in vars(task):  # without asking for one
        seconds.append(task.ranking.seconds)
    before = [0, *(entry.spent_tokens for entry in history)]
    spent = [(entry.owner, entry.spent_tokens - earlier) for entry, earlier in zip(history, before, strict=False)]
    return {
        "token_budget": task.problem.budget.limit,
        "tokens": result.tokens,
        "evaluations": result.evaluations,
        "fresh_evaluations": meter.fresh_evaluations,
        "seconds": result.seconds,
        "measured_seconds": sum(seconds),
        "ranking_tokens": sum(tokens for owner, tokens in spent if owner != meter.owner),
        "details": result.details,
    }


def _references(task: Task) -> dict[str, Policy]:
    """Policies that need no search; the greedy walk only if its ranking was paid for."""
    shape = task.problem.shape
    known = {"dense": DensePolicy(shape), "random": RandomPolicy(shape)}
    return known | ({"greedy_gsi": OrderPolicy(shape, task.ranking.order)} if "ranking" in vars(task) else {})


def best_so_far(masks: Sequence[PruningMask], problem: PruningProblem, scenarios: Sequence[Scenario]) -> np.ndarray:
    """The best search score among the first masks that fit, [masks, scenarios]; minus infinity until one fits."""
    scores = np.full((len(masks), len(scenarios)), -np.inf)
    for row, mask in zip(scores, masks, strict=True):
        for index, scenario in enumerate(scenarios):
            if footprint(problem.shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes:
                row[index] = problem.meter.known[mask].score
    return np.maximum.accumulate(scores, axis=0)


def anytime(best: np.ndarray, spent_tokens: Sequence[int]) -> list[list[float]]:
    """Where the mean over the scenarios of the best score so far changes: [tokens spent, mean score].

    It begins when every scenario has a mask that fits, and ends with the last evaluation.

    Args:
        best: What `best_so_far` returns [masks, scenarios].
        spent_tokens: Tokens that were spent by each evaluation.
    """
    means = best.mean(axis=1)
    last = len(means) - 1
    return [
        [spent_tokens[index], float(mean)]
        for index, mean in enumerate(means)
        if np.isfinite(mean) and (index in (0, last) or mean > means[index - 1])
    ]


def rows(
    policy: Policy,
    search: PruningProblem,
    reports: Mapping[str, PruningProblem],
    scenarios: Sequence[Scenario],
    best: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """A JSON-able row for each scenario: what the policy drops, and how good that is on both halves.

    Args:
        policy: Decides.
        search: Evaluates on the search half.
        reports: Evaluate on report halves, by name.
        scenarios: What it decides.
        best: What `best_so_far` returns of the search [masks, scenarios].
    """
    reported = {name: _decided(policy, problem, scenarios) for name, problem in reports.items()}
    made = []
    for index, (mask, outcome) in enumerate(_decided(policy, search, scenarios)):
        scenario = scenarios[index]
        top = float(best[-1, index]) if best is not None and len(best) else -math.inf
        made.append(
            _scenario(search.shape, scenario)
            | {
                "footprint": outcome.footprint.as_dict(),
                "violation": not outcome.fits,
                "dropped": [component.name for component in mask.dropped],
                "decision_milliseconds": _decision_milliseconds(policy, scenario),
                "best_evaluated": top if math.isfinite(top) else None,
                "search": {"score": outcome.score, "tasks": outcome.evaluation.tasks},
                "reports": {name: _report(reports[name], of[index][1]) for name, of in reported.items()},
            }
        )
    return made


def _scenario(shape, scenario: Scenario) -> dict[str, Any]:
    workload = scenario.workload
    return {
        "batch_size": workload.batch_size,
        "prompt_tokens": workload.prompt_tokens,
        "generated_tokens": workload.generated_tokens,
        "budget_bytes": scenario.budget_bytes,
        "budget_ratio": scenario.budget_bytes / dense_bytes(shape, workload),
    }


def _report(problem: PruningProblem, outcome: Outcome) -> dict[str, Any]:
    return {
        "score": outcome.score,
        "reward": problem.reward(outcome),
        # an evaluation by text has no smooth accuracy
        "reward_terms": {term: value for term, value in outcome.reward_terms.items() if math.isfinite(value)},
        "tasks": outcome.evaluation.tasks,
    }


def _decision_milliseconds(policy: Policy, scenario: Scenario) -> float:
    seconds = []
    for _repeat in range(_DECISION_REPEATS):
        started = time.perf_counter()
        policy.decide(scenario.workload, scenario.budget_bytes)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def count_violations(policy: Policy, sampler: ScenarioSampler, decisions: int) -> int:
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
