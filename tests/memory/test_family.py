"""A family of contexts fills its ranges evenly, holds out what is not searched on, and goes beyond where asked."""

import numpy as np
import pytest

from rap_env.errors import InvalidConfig, InvalidWorkload
from rap_env.memory.family import family_contexts
from rap_env.memory.footprint import dense_bytes, smallest_bytes
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.memory.workload import Workload

RANGES = {"batch_size": (1, 16), "prompt_tokens": (128, 2048), "budget_ratio": (0.6, 0.95)}
WIDER = {"batch_size": (1, 32), "prompt_tokens": (64, 4096), "budget_ratio": (0.2, 0.95)}


@pytest.fixture
def sampler() -> ScenarioSampler:
    return ScenarioSampler(**RANGES)


def coordinates(shape, scenario: Scenario) -> tuple[int, int, float]:
    work = scenario.workload
    return work.batch_size, work.prompt_tokens, scenario.budget_bytes / dense_bytes(shape, work)


def test_searched_held_out_and_outside_contexts_are_all_different(tiny_llm, sampler):
    shape = tiny_llm.shape
    searched = family_contexts(shape, sampler, 64)
    reported = family_contexts(shape, sampler, 64, 64, ScenarioSampler(**WIDER), 16)
    assert (len(searched), len(reported), len({*searched, *reported})) == (64, 80, 144)
    assert all(sampler.covers(*coordinates(shape, each)) for each in [*searched, *reported[:64]])
    assert not any(sampler.covers(*coordinates(shape, each)) for each in reported[64:])


def test_contexts_fill_every_part_of_their_ranges_evenly(tiny_llm, sampler):
    seen = np.array([coordinates(tiny_llm.shape, each) for each in family_contexts(tiny_llm.shape, sampler, 64)])
    # a Sobol sequence has 16 of 64 points in each quarter of a range; rounding to whole tokens may move one
    for values, quarters in (
        (np.log(seen[:, 1]), np.log(128) + np.log(16) * np.arange(5) / 4),
        (seen[:, 2], 0.6 + 0.35 * np.arange(5) / 4),
    ):
        quarters[[0, -1]] += -1e-3, 1e-3
        assert np.abs(np.histogram(values, quarters)[0] - 16).max() <= 1


def test_a_family_is_decided_by_its_seed(tiny_llm, sampler):
    first, again, other = (family_contexts(tiny_llm.shape, sampler, 16, seed=seed) for seed in (0, 0, 1))
    assert first == again and not set(first) & set(other)
    assert family_contexts(tiny_llm.shape, sampler, 32)[:16] == first, "more contexts begin with the same"


def test_contexts_that_no_mask_can_serve_are_passed_over(tiny_llm):
    shape, tight = tiny_llm.shape, ScenarioSampler((1, 16), (128, 100_000), (0.01, 0.95))
    contexts = family_contexts(shape, tight, 32)
    assert all(each.budget_bytes >= smallest_bytes(shape, each.workload) for each in contexts)
    assert all(each.workload.prompt_tokens <= shape.context_tokens for each in contexts)


def test_ranges_that_hold_too_few_contexts_are_refused(tiny_llm, sampler):
    with pytest.raises(InvalidConfig, match="ranges with 3 contexts that a mask can serve; found 1"):
        family_contexts(tiny_llm.shape, ScenarioSampler((1, 1), (1, 1), (0.8, 0.8)), 3)
    with pytest.raises(InvalidConfig, match="ranges with 2 contexts that a mask can serve; found 0"):
        family_contexts(tiny_llm.shape, sampler, 4, 4, sampler, 2)
    for wrong in ({"n": 0}, {"n": 4, "first": -1}, {"n": 4, "n_outside": 1}):
        with pytest.raises(InvalidConfig, match="expected at least one context"):
            family_contexts(tiny_llm.shape, sampler, **wrong)


@pytest.mark.parametrize(
    ("context", "covered"),
    [
        *(((1, 128, 0.6), True), ((16, 2048, 0.95), True), ((8, 512, 0.6 - 1e-8), True)),
        *(((17, 512, 0.7), False), ((8, 127, 0.7), False), ((8, 512, 0.59), False), ((8, 512, 0.96), False)),
    ],
)
def test_a_sampler_covers_what_lies_within_all_its_ranges(context, covered, sampler):
    assert sampler.covers(*context) == covered


def test_scenarios_are_drawn_log_uniformly_from_the_generators_next_three_numbers(tiny_llm, sampler):
    scenario = sampler.sample(tiny_llm.shape, np.random.default_rng(3))
    of_batch, of_prompt, of_budget = np.random.default_rng(3).random(3)
    batch, prompt, ratio = coordinates(tiny_llm.shape, scenario)
    assert (batch, prompt) == (round(16**of_batch), round(128 * 16**of_prompt))
    assert ratio == pytest.approx(0.6 + 0.35 * of_budget, abs=1e-5)


def test_contexts_of_kinds_of_text_have_each_kind_equally_often(tiny_llm):
    kinds = ("code", "prose", "questions", "chats")
    sampler = ScenarioSampler(**RANGES, kinds=kinds)
    contexts = family_contexts(tiny_llm.shape, sampler, 64)
    assert [sum(each.workload.kind == kind for each in contexts) for kind in kinds] == [16] * 4
    scenario = sampler.sample(tiny_llm.shape, np.random.default_rng(3))
    assert scenario.workload.kind == kinds[int(4 * np.random.default_rng(3).random(4)[3])]
    assert str(scenario.workload).endswith(f" tokens of {scenario.workload.kind}")
    with pytest.raises(InvalidWorkload, match="kinds: expected each once; got code, code"):
        ScenarioSampler(kinds=["code", "code"])
    with pytest.raises(InvalidWorkload, match="kind must be the name of a kind of text; got 3"):
        Workload(1, 1, kind=3)
