"""Figures of merit equal what one computes by hand."""

import numpy as np
import pytest

from experiments.comparison import Comparison, is_comparison
from experiments.merit import (
    best_known,
    interquartile_mean,
    loss_over_dense,
    merit_table,
    plain_mean,
    regret,
    scenario_means,
    spending_table,
    with_interval,
)
from tests.experiments.comparison_records import COMPONENTS, record, records, row

WORK = (1, 512)


@pytest.fixture
def comparison() -> Comparison:
    return Comparison.of(records())


def test_loss_over_dense_is_the_dense_score_minus_the_own(comparison):
    # on the report half the dense loss is 2.5; greedy has 1.25 (4 - ratio)
    expected = [[1.25 * (4 - ratio) - 2.5 for ratio in (0.9, 0.6, 0.9, 0.6)]]
    assert loss_over_dense(comparison, "greedy", "text") == pytest.approx(np.array(expected))
    assert loss_over_dense(comparison, "greedy", "tasks")[0, 0] == pytest.approx(0.8 - (1 - 0.31))


def test_a_violated_budget_costs_infinity(comparison):
    assert np.isinf(loss_over_dense(comparison, "dense", "text")).all()
    assert np.isinf(regret(comparison, "dense", "search")).all()


def test_regret_is_against_the_best_mask_of_any_agent_that_fits(comparison):
    # the learned agent's seed 0 is the best one: 3.5 - ratio on the search half; dense masks do not fit
    assert best_known(comparison, "text") == pytest.approx([-1.25 * (3.5 - ratio) for ratio in (0.9, 0.6, 0.9, 0.6)])
    assert regret(comparison, "learned", "text") == pytest.approx(np.array([[0.0] * 4, [0.125] * 4]), abs=1e-12)
    assert regret(comparison, "greedy", "text") == pytest.approx(np.full((1, 4), 0.625))


def test_on_the_search_half_masks_that_were_only_asked_about_are_known_too():
    made = record("greedy", 0, [row(WORK, 0.9, 3.0, []) | {"best_asked": -2.5}, row(WORK, 0.6, 4.0, [])])
    comparison = Comparison.of([made])
    assert best_known(comparison, "search").tolist() == [-2.5, -4.0]
    assert regret(comparison, "greedy", "search").tolist() == [[0.5, 0.0]]
    assert regret(comparison, "greedy", "text").tolist() == [[0.0, 0.0]]


def test_a_scenario_that_nobody_serves_costs_everybody_infinity():
    comparison = Comparison.of([record("dense", 0, [row(WORK, 0.9, 2.0, [], True) | {"best_asked": None}])])
    assert regret(comparison, "dense", "search").tolist() == [[np.inf]]


def test_interquartile_mean_drops_the_lowest_and_the_highest_quarter():
    assert interquartile_mean(np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, np.inf]])) == (2 + 3 + 4 + 5) / 4
    assert np.isinf(interquartile_mean(np.array([[0.0, 1.0, np.inf, np.inf]])))


def test_intervals_resample_whole_seeds():
    costs = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])
    value, low, high = with_interval(costs, scenario_means)
    # independent scenarios could give means of one seed's first and of another's second; whole seeds differ by 10
    assert value.tolist() == [1.0, 11.0]
    assert (low + 10 == low[::-1])[0] and (high + 10 == high[::-1])[0]
    assert 0.0 <= low[0] < 1.0 < high[0] <= 2.0


def test_one_seed_has_an_interval_of_no_width():
    value, low, high = with_interval(np.array([[1.0, 2.0, 4.0, 9.0]]))
    assert value == low == high == 3.0
    assert with_interval(np.array([[1.0, 2.0, 4.0, 9.0]]), plain_mean)[0] == 4.0


def test_table_has_the_best_agent_first_and_counts_violations(comparison):
    columns, cells = merit_table(comparison)
    assert [line[0] for line in cells] == ["learned", "greedy", "random", "dense"]
    table = {line[0]: dict(zip(columns, line, strict=True)) for line in cells}
    assert table["dense"]["violations"] == "4 of 4" and table["dense"]["unseen violations"] == "10 of 10"
    assert table["dense"]["IQM regret (text)"] == "-"
    assert table["greedy"]["IQM log-perplexity over dense (text)"] == "1.562"  # 1.25 * (4 - 0.75) - 2.5
    mean = loss_over_dense(comparison, "random", "text").mean()
    assert table["random"]["mean log-perplexity over dense (text)"].split()[0] == f"{mean:.3f}"
    assert table["learned"]["evaluations"] == "20" and table["learned"]["search GB"] == "2.00"


def test_spending_says_what_evaluations_bought(comparison):
    columns, cells = spending_table(comparison)
    assert columns == ["agent", "0", "2", "5", "10", "20"]
    assert cells == [
        ["greedy", "1.250", *"----"],
        ["learned", "-", "-", "2.000", "1.500", "1.500"],
        ["random", "4.500", *"----"],
    ]  # dense violates everything


def test_records_are_ordered_by_agent_and_seed_whatever_order_they_come_in():
    assert Comparison.of(records()) == Comparison.of(records()[::-1])
    assert Comparison.of(records()).components == COMPONENTS
    assert all(map(is_comparison, records())) and not is_comparison({"results": {"summary": {}}})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda made: [], "at least one record of a comparison; got none"),
        (lambda made: [*made, made[-1]], "there are several of random 1"),
        (
            lambda made: [*made, record("ppo", 0, [row(WORK, 0.9, 3.0, [])])],
            "of one comparison; their scenarios differ",
        ),
        (lambda made: [*made[:-1], made[-1] | {"provenance": {"model_digest": "1"}}], "their model_digest differ"),
    ],
    ids=["none", "twice", "other scenarios", "other model"],
)
def test_records_that_do_not_belong_together_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        Comparison.of(spoil(records()))
