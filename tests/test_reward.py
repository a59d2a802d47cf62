"""The reward is the sum of named terms times same-named weights."""

import math

import pytest

from rap_env.errors import InvalidReward
from rap_env.reward import overshoot_ratio, perplexity_ratio, weighted_reward


@pytest.mark.parametrize(
    ("peak_bytes", "budget_bytes", "expected"),
    [
        (150, 100, 0.5),
        (100, 100, 0.0),
        (99, 100, 0.0),
        (1, 100, 0.0),
        (300, 100, 2.0),
        (125_000_000, 100_000_000, 0.25),
    ],
)
def test_overshoot_is_the_excess_as_a_fraction_of_the_budget(peak_bytes, budget_bytes, expected):
    assert overshoot_ratio(peak_bytes, budget_bytes) == expected


def test_the_perplexity_ratio_is_that_of_dense_over_masked_and_stays_finite():
    assert perplexity_ratio(-math.log(40.0), -math.log(26.0)) == pytest.approx(26 / 40)
    assert perplexity_ratio(-3.0, -3.0) == 1.0 and perplexity_ratio(-1e6, -3.0) == 0.0
    assert math.isfinite(perplexity_ratio(-3.0, -1e6))


def test_the_reward_sums_weights_times_terms_of_the_same_name():
    terms = {"accuracy": 0.5, "smooth_accuracy": 0.25, "overshoot": 0.125, "violation": 1.0}
    weights = {"violation": -0.5, "overshoot": -2.0, "accuracy": 3.0}
    assert weighted_reward(terms, weights) == 3.0 * 0.5 - 2.0 * 0.125 - 0.5 * 1.0  # 0.75: smooth_accuracy has no weight


def test_no_weights_give_no_reward():
    assert weighted_reward({"accuracy": 0.5}, {}) == 0.0


def test_a_weight_without_a_term_is_refused_with_the_known_terms():
    with pytest.raises(InvalidReward, match="reward weight 'acuracy' has no term; known terms: accuracy, overshoot"):
        weighted_reward({"overshoot": 0.0, "accuracy": 0.5}, {"acuracy": 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weighted_term_that_is_not_finite_is_refused(value):
    with pytest.raises(InvalidReward, match=r"reward term 'accuracy' is (nan|inf|-inf) with weight 1\.0"):
        weighted_reward({"accuracy": value}, {"accuracy": 1.0})


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(InvalidReward, match=r"reward term 'accuracy' is 0\.5 with weight nan"):
        weighted_reward({"accuracy": 0.5}, {"accuracy": float("nan")})


def test_a_term_that_is_not_finite_does_no_harm_without_a_weight():
    assert weighted_reward({"accuracy": 0.5, "smooth_accuracy": float("nan")}, {"accuracy": 2.0}) == 1.0
