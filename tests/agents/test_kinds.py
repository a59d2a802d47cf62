"""Searches whose workloads are of kinds of text: each kind is served by what was measured on it."""

import dataclasses

import pytest

from agents.driver import run_search
from rap_env.evaluation.mixture import KindsEvaluator
from rap_env.memory.scenario import ScenarioSampler, scenario_grid
from rap_env.memory.workload import Workload
from rap_env.policies import load_policy, save_policy
from tests.agents.cases import LastIsLeast, build_agent, decided, make_task
from tests.conftest import CountingEvaluator

GRID = ([(2, 100), (8, 500)], [0.9, 0.7])


def searched(llm, evaluator, kinds=()):
    task = make_task(llm, 10**6, evaluator)
    task = dataclasses.replace(task, sampler=ScenarioSampler((1, 4), (64, 256), kinds=kinds))
    return task, run_search(build_agent("single_site_greedy"), task).policy


def test_greedy_walks_along_the_curves_of_each_kind(tiny_llm, tmp_path):
    alone = {"code": LastIsLeast(), "prose": CountingEvaluator()}  # they contradict one another
    task, policy = searched(tiny_llm, KindsEvaluator(alone), ["code", "prose"])
    policy = load_policy(save_policy(policy, tmp_path))
    for kind, evaluator in alone.items():
        for scenario in scenario_grid(tiny_llm.shape, *GRID):
            _task, expected = searched(tiny_llm, evaluator)
            (mask,) = decided(expected, [scenario])
            workload = dataclasses.replace(scenario.workload, kind=kind)
            assert policy.decide(workload, scenario.budget_bytes) == mask
    assert task.problem.meter.fresh_evaluations == 9, "the evaluations of one curve have measured all of them"
    assert policy.decide(Workload(2, 100), 10**9) is not None


def test_what_is_remembered_of_a_mask_is_its_mean_over_the_kinds(tiny_llm):
    evaluator = KindsEvaluator({"code": LastIsLeast(), "prose": CountingEvaluator()})
    task = make_task(tiny_llm, 10, evaluator)
    of_code = [
        dataclasses.replace(each, workload=dataclasses.replace(each.workload, kind="code")) for each in task.scenarios
    ]
    task = dataclasses.replace(task, scenarios=of_code)
    run_search(build_agent("random_search"), task)
    assert task.archive
    for mask, reward in task.archive.items():
        assert reward == pytest.approx(task.problem.known(mask).score)
        assert task.problem.known(mask, "code").score == pytest.approx(LastIsLeast.rule(mask.keep))
