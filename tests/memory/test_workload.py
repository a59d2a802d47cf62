"""Workloads are positive whole numbers within a model's context; scenarios pair them with budgets that can be met."""

import math

import numpy as np
import pytest

from rap_env.errors import InfeasibleBudget, InvalidWorkload
from rap_env.memory.footprint import dense_bytes, smallest_bytes
from rap_env.memory.scenario import Scenario, ScenarioSampler, scenario_grid
from rap_env.memory.workload import Workload


@pytest.fixture(scope="module")
def shape(tiny_llm):
    return tiny_llm.shape  # context of 8,192 tokens


def test_tokens_are_counted_with_what_is_generated():
    workload = Workload(batch_size=3, prompt_tokens=10, generated_tokens=4)
    assert workload.sequence_tokens == 14
    assert Workload(3, 10).sequence_tokens == 10


def test_workloads_are_written_as_they_are_read():
    assert str(Workload(8, 2048)) == "8 x 2048 tokens"
    assert str(Workload(8, 2048, 64)) == "8 x 2048 + 64 tokens"


def test_whole_numbers_of_any_type_become_plain_integers():
    workload = Workload(np.int64(2), np.float32(8.0), 3.0)
    assert workload == Workload(2, 8, 3)
    assert {type(v) for v in (workload.batch_size, workload.prompt_tokens, workload.generated_tokens)} == {int}


@pytest.mark.parametrize(
    ("window", "tokens"), [(None, 14), (100, 14), (15, 14), (14, 13), (5, 4), (2, 1), (1, 14)], ids=str
)
def test_a_window_leaves_one_token_less_than_it_spans(window, tokens):
    assert Workload(3, 10, 4).cached_tokens(window) == 3 * tokens


NOT_WHOLE = [True, False, np.True_, 1.5, math.nan, math.inf, -math.inf, "8", None, [8]]


@pytest.mark.parametrize("value", [0, -1, *NOT_WHOLE])
@pytest.mark.parametrize("name", ["batch_size", "prompt_tokens"])
def test_a_size_that_is_no_positive_integer_is_refused(name, value):
    with pytest.raises(InvalidWorkload, match=rf"^{name} must be an integer of at least 1; got ") as refusal:
        Workload(**{"batch_size": 1, "prompt_tokens": 1, name: value})
    assert str(refusal.value).endswith(repr(value))


@pytest.mark.parametrize("value", [-1, *NOT_WHOLE])
def test_generated_tokens_may_be_zero_but_nothing_less(value):
    assert Workload(1, 1, 0).generated_tokens == 0
    with pytest.raises(InvalidWorkload, match=r"^generated_tokens must be an integer of at least 0; got "):
        Workload(1, 1, value)


def test_sequences_up_to_the_context_are_allowed_and_longer_ones_refused():
    Workload(64, 90, 10).check_context(100)
    Workload(64, 100).check_context(100)
    with pytest.raises(InvalidWorkload, match=r"64 x 1000 \+ 24 tokens needs 1,024 tokens a sequence; .* is 1,023"):
        Workload(64, 1000, 24).check_context(1023)


def test_a_budget_ratio_is_a_fraction_of_the_dense_footprint(shape):
    # The tiny Llama: 4 * (16,736 + 4 * (3,072 + 6,144)) bytes of weights and 4 * 2 * 4 * 16 of KV cache a token.
    dense = 4 * 53_600 + 512 * 1000
    scenario = Scenario.from_ratio(shape, Workload(10, 100), 0.75)
    assert dense_bytes(shape, Workload(10, 100)) == dense == 726_400
    assert scenario == Scenario(Workload(10, 100), 544_800)


def test_a_ratio_below_what_is_left_without_components_is_refused(shape):
    # Without components 4 * 16,736 = 66,944 of 4 * 53,600 + 512 = 214,912 bytes are left: a ratio of 0.3115.
    assert Scenario.from_ratio(shape, Workload(1, 1), 0.3116).budget_bytes == 66_966
    with pytest.raises(
        InfeasibleBudget, match=r"no pruning mask fits 66,923 bytes for 1 x 1 .* needs 66,944 bytes"
    ) as e:
        Scenario.from_ratio(shape, Workload(1, 1), 0.3114)
    assert (e.value.budget_bytes, e.value.smallest_bytes) == (66_923, 66_944)


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_ratios_of_nothing_are_infeasible(shape, ratio):
    with pytest.raises(InfeasibleBudget, match="still needs 66,944 bytes"):
        Scenario.from_ratio(shape, Workload(1, 1), ratio)


def test_a_ratio_that_is_no_number_is_infeasible(shape):
    with pytest.raises(InfeasibleBudget, match="no pruning mask fits nan bytes"):
        Scenario.from_ratio(shape, Workload(1, 1), math.nan)


def test_samples_stay_within_their_ranges_and_reach_both_ends(shape):
    sampler = ScenarioSampler((2, 8), (100, 200), (0.5, 0.9), generated_tokens=7)
    generator = np.random.default_rng(0)
    scenarios = [sampler.sample(shape, generator) for _ in range(300)]
    assert {s.workload.batch_size for s in scenarios} == set(range(2, 9))
    lengths = [s.workload.prompt_tokens for s in scenarios]
    assert 100 <= min(lengths) < 105 and 195 < max(lengths) <= 200
    assert {s.workload.generated_tokens for s in scenarios} == {7}
    ratios = [s.budget_bytes / dense_bytes(shape, s.workload) for s in scenarios]
    assert 0.499 < min(ratios) < 0.51 and 0.89 < max(ratios) <= 0.9
    assert all(s.budget_bytes >= smallest_bytes(shape, s.workload) for s in scenarios)


def test_lengths_are_drawn_evenly_on_a_logarithmic_scale(shape):
    sampler = ScenarioSampler((1, 1), (16, 4096), (0.9, 0.9))
    generator = np.random.default_rng(1)
    lengths = [sampler.sample(shape, generator).workload.prompt_tokens for _ in range(1000)]
    assert 430 < sum(length < 256 for length in lengths) < 570  # 256 is the geometric middle: half of them, +- 4 sigma


def test_the_same_generator_state_draws_the_same_scenarios(shape):
    draws = [[ScenarioSampler().sample(shape, g) for _ in range(5)] for g in map(np.random.default_rng, (3, 3, 4))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("name", ["batch_size", "prompt_tokens", "budget_ratio"])
@pytest.mark.parametrize("bounds", [(0, 4), (-1, 4), (4, 2), (math.nan, 4), (4, math.inf)])
def test_empty_ranges_are_refused_by_name(name, bounds):
    with pytest.raises(InvalidWorkload, match=rf"^{name}: expected 0 < smallest <= largest; got {bounds[0]} and "):
        ScenarioSampler(**{name: bounds})


def test_ranges_that_the_model_can_serve_pass_the_check(shape):
    ScenarioSampler((1, 16), (1, 8192), (0.32, 0.9)).check(shape)


def test_a_corner_beyond_the_context_is_found_before_any_sampling(shape):
    with pytest.raises(InvalidWorkload, match=r"8192 \+ 1 tokens needs 8,193 tokens a sequence; .* context is 8,192"):
        ScenarioSampler((1, 1), (128, 8192), generated_tokens=1).check(shape)


def test_a_corner_that_no_mask_can_meet_is_found_before_any_sampling(shape):
    # 0.31 is infeasible at 1 x 1 (see above) and feasible everywhere else, for the KV cache can be dropped entirely.
    with pytest.raises(InfeasibleBudget, match="for 1 x 1 tokens"):
        ScenarioSampler((1, 16), (1, 8192), (0.31, 0.9)).check(shape)


def test_a_grid_holds_every_workload_with_every_ratio(shape):
    grid = scenario_grid(shape, [(1, 128), (4, 256)], [0.6, 0.8], generated_tokens=2)
    assert grid == [
        Scenario.from_ratio(shape, Workload(batch_size, tokens, 2), ratio)
        for batch_size, tokens, ratio in [(1, 128, 0.6), (1, 128, 0.8), (4, 256, 0.6), (4, 256, 0.8)]
    ]
