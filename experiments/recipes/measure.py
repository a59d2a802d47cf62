"""From what an agent's search ended as to the results of its record."""

import functools
import math
import statistics
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
    policy, problem, told = result.policy, task.problem, parts.reports
    main = next(iter(told))
    evaluated = dict(evaluated_masks(task))
    best = best_so_far(list(evaluated), problem, parts.reported)
    dense, problems = PruningMask.all_kept(problem.shape), {"search": parts.search, **told}
    return {
        "objective": statistics.mean(map(parts.search.reward, _outcomes(policy, parts.search, parts.searched))),
        "components": [component.name for component in problem.shape.components],
        "evaluators": list(told),
        "dense": {name: each.meter.evaluate([dense])[0].score for name, each in problems.items()},
        "search": _cost(result, task),
        "anytime": anytime(best, list(evaluated.values())),
        "rows": rows(policy, parts.search, told, parts.reported, best[-1] if len(best) else None),
        "references": {
            name: rows(other, parts.search, told if name == "dense" else {main: told[main]}, parts.reported)
            for name, other in _references(task).items()
        },
        "held_out": {"decisions": decisions, "violations": count_violations(policy, parts.sampler, decisions)},
        **parts.counts,
    }


def _outcomes(policy: Policy, problem: PruningProblem, scenarios: Sequence[Scenario]) -> list[Outcome]:
    """What comes of the masks that a policy decides on."""
    masks = [policy.decide(scenario.workload, scenario.budget_bytes) for scenario in scenarios]
    cases = [(mask, each.workload, each.budget_bytes) for mask, each in zip(masks, scenarios, strict=True)]
    return problem.evaluate_many(cases)


def _cost(result: SearchResult, task: Task) -> dict[str, Any]:
    """What the search took: tokens as it was charged, seconds as they were measured, whoever measured them."""
    meter, history = task.problem.meter, task.problem.budget.history
    before = [0, *(entry.spent_tokens for entry in history)]
    spent = [(entry.owner, entry.spent_tokens - earlier) for entry, earlier in zip(history, before, strict=False)]
    return {
        "token_budget": task.problem.budget.limit,
        "tokens": result.tokens,
        "tokens_each": meter.tokens_each,
        "evaluations": result.evaluations,
        "fresh_evaluations": meter.fresh_evaluations,
        "seconds": result.seconds,
        "measured_seconds": task.problem.budget.measured_seconds,
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
                row[index] = problem.known(mask, scenario.workload.kind).score
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
        best: The best search scores that the search has evaluated [scenarios], if it evaluated any mask.
    """
    outcomes, made = _outcomes(policy, search, scenarios), []
    tops = [-math.inf] * len(scenarios) if best is None else best.tolist()
    reported = {name: _outcomes(policy, problem, scenarios) for name, problem in reports.items()}
    for index, (scenario, outcome, top) in enumerate(zip(scenarios, outcomes, tops, strict=True)):
        decide = functools.partial(policy.decide, scenario.workload, scenario.budget_bytes)
        seconds = timeit.repeat(decide, number=1, repeat=_DECISION_REPEATS)
        row = {
            **asdict(scenario.workload),
            "budget_bytes": scenario.budget_bytes,
            "budget_ratio": scenario.budget_bytes / dense_bytes(search.shape, scenario.workload),
            "footprint": outcome.footprint.as_dict(),
            "violation": not outcome.fits,
            "dropped": [component.name for component in decide().dropped],
            "decision_milliseconds": 1000 * statistics.median(seconds),
            "best_evaluated": top if math.isfinite(top) else None,
            "search": {"score": outcome.score, "tasks": outcome.evaluation.tasks},
            "reports": {name: _report(reports[name], of_half[index]) for name, of_half in reported.items()},
        }
        made.append(row)
    return made


def _report(problem: PruningProblem, outcome: Outcome) -> dict[str, Any]:
    terms = outcome.reward_terms
    return {
        "score": outcome.score,
        "reward": problem.reward(outcome) if problem.reward_weights.keys() <= terms.keys() else None,  # texts lack some
        "reward_terms": terms,
        "tasks": outcome.evaluation.tasks,
    }


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
