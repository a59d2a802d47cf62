"""Metrics of a comparison equal what one computes by hand."""

import copy
import json

import numpy as np
import pytest

from experiments.records import read_records
from experiments.report.comparison import Comparison
from experiments.report.metrics import (
    best_known,
    interquartile_mean,
    loss_over_dense,
    plain_mean,
    regret,
    scenario_means,
    with_spread,
)
from tests.experiments.comparison_records import record, records, row

WORK = (1, 512)


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(records())


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


def test_on_the_search_half_masks_that_were_only_evaluated_are_known_too():
    made = record("greedy", 0, [row(WORK, 0.9, 3.0, []) | {"best_evaluated": -2.5}, row(WORK, 0.6, 4.0, [])])
    comparison = Comparison([made])
    assert best_known(comparison, "search").tolist() == [-2.5, -4.0]
    assert regret(comparison, "greedy", "search").tolist() == [[0.5, 0.0]]
    assert regret(comparison, "greedy", "text").tolist() == [[0.0, 0.0]]


def test_a_scenario_that_nobody_serves_costs_everybody_infinity():
    comparison = Comparison([record("dense", 0, [row(WORK, 0.9, 2.0, [], True) | {"best_evaluated": None}])])
    assert regret(comparison, "dense", "search").tolist() == [[np.inf]]


def test_interquartile_mean_drops_the_lowest_and_the_highest_quarter():
    assert interquartile_mean(np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, np.inf]])) == (2 + 3 + 4 + 5) / 4
    assert np.isinf(interquartile_mean(np.array([[0.0, 1.0, np.inf, np.inf]])))


def test_fewer_than_five_seeds_spread_over_their_range():
    costs = np.array([[0.0, 1.0], [3.0, 5.0], [1.0, 1.0], [2.0, 3.0]])
    value, low, high = with_spread(costs, plain_mean)  # the seeds alone have 0.5, 4, 1 and 2.5
    assert (value, low, high) == (2.0, 0.5, 4.0)
    value, low, high = with_spread(costs, scenario_means)
    assert (value.tolist(), low.tolist(), high.tolist()) == ([1.5, 2.5], [0.0, 1.0], [3.0, 5.0])


def test_five_seeds_have_an_interval_that_resamples_whole_seeds():
    costs = np.array([[seed, 10.0 + seed] for seed in range(5)])
    value, low, high = with_spread(costs, scenario_means)
    # independent scenarios could give means of one seed's first and of another's second; whole seeds differ by 10
    assert value.tolist() == [2.0, 12.0]
    assert low[0] + 10 == low[1] and high[0] + 10 == high[1]
    assert 0.0 < low[0] < 2.0 < high[0] < 4.0, "narrower than the range"


def test_one_seed_has_a_spread_of_no_width():
    value, low, high = with_spread(np.array([[1.0, 2.0, 4.0, 9.0]]))
    assert value == low == high == 3.0
    assert with_spread(np.array([[1.0, 2.0, 4.0, 9.0]]), plain_mean)[0] == 4.0


def test_seeds_with_equal_records_count_as_one():
    made = [record("milp", seed, [row(WORK, 0.9, 3.0, ["layer0.mlp"])]) for seed in range(3)]
    made[1]["results"]["rows"][0]["decision_milliseconds"] = 7.0  # a clock is no outcome
    comparison = Comparison(made)
    assert len(comparison.runs("milp")) == 1 and comparison.seeds("milp") == "1 (deterministic)"
    made[2]["results"]["rows"][0]["dropped"] = ["layer1.mlp"]
    assert len(Comparison(made).runs("milp")) == 3 and Comparison(made).seeds("milp") == "3"


def test_best_score_so_far_is_that_of_the_tokens_spent(comparison):
    assert comparison.best_after("learned", 399) == -np.inf
    assert [comparison.best_after("learned", tokens) for tokens in (400, 899, 900, 2000)] == [-4, -4, -3.5, -3.5]


def test_who_evaluates_no_mask_has_its_policys_score_once_its_ranking_is_paid(comparison):
    assert comparison.best_after("greedy", 599) == -np.inf
    assert comparison.best_after("greedy", 600) == pytest.approx(-(4 - 0.75))  # mean over ratios 0.9 and 0.6
    assert comparison.best_after("random", 0) == -6.5, "mean of both seeds"


def test_records_are_ordered_by_agent_and_seed_whatever_order_they_come_in():
    assert Comparison(records()).records == Comparison(records()[::-1]).records
    assert Comparison(records()).agents == ["dense", "greedy", "learned", "random"]


def changed(made: list[dict], **of_config) -> list[dict]:
    other = copy.deepcopy(made[-1])
    other["config"] |= of_config
    return [*made[:-1], other]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda made: [], "at least one record of a comparison; got none"),
        (lambda made: [*made, made[-1]], "there are several of random 1"),
        (lambda made: [*made, record("ppo", 0, [row(WORK, 0.9, 3.0, [])])], "one comparison; their scenarios differ"),
        (lambda made: [*made[:-1], made[-1] | {"provenance": {"model_digest": "1"}}], "their model_digest differ"),
        (lambda made: changed(made, token_budget=1000), "their token_budget differ"),
        (lambda made: [made[0] | {"results": {"agent": "ppo", "seed": 0}}], "missing components, evaluators"),
    ],
    ids=["none", "twice", "other scenarios", "other model", "other budget", "no run"],
)
def test_records_that_do_not_belong_together_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        Comparison(spoil(records()))


def test_seed_agent_and_tracker_may_differ_in_a_comparison():
    assert len(Comparison(changed(records(), tracker="wandb", agent={"x": 1}, seed=9, store="elsewhere")).records) == 6


def test_records_are_read_from_tables_folders_and_files(tmp_path):
    table = tmp_path / "toys.jsonl"
    table.write_text("".join(json.dumps(made) + "\n" for made in records()))
    for number, made in enumerate(records()):
        (tmp_path / "sweep" / str(number)).mkdir(parents=True)
        (tmp_path / "sweep" / str(number) / "record.json").write_text(json.dumps(made))
    (tmp_path / "sweep" / "0" / "policy.json").write_text("{}")
    assert read_records(table) == records() == read_records(tmp_path / "sweep")
    assert read_records(tmp_path / "sweep" / "1" / "record.json") == [records()[1]]


def test_what_holds_no_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected record\.json files in .*; there are none"):
        read_records(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps(records()[0]) + '\n{"config": {}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: a record needs .* missing: provenance, results"):
        read_records(tmp_path / "a.jsonl")


def on_own_text(agent: str, seed: int, harder: float, loss: float, evaluation_seed: int) -> dict:
    """A record whose search text is harder by so much for every mask, the dense model among them."""
    made = record(agent, seed, [row(WORK, 0.9, loss, [])], evaluations=12)
    made["config"]["evaluation"] = {"name": "text", "seed": evaluation_seed}
    made["results"]["dense"]["search"] -= harder
    for one in made["results"]["rows"]:
        one["search"]["score"] -= harder
        one["best_evaluated"] -= harder
    made["results"]["anytime"] = [[tokens, score - harder] for tokens, score in made["results"]["anytime"]]
    return made


def test_seeds_that_draw_search_text_of_their_own_are_compared_relative_to_the_dense_model_there():
    harder = [on_own_text("agent", seed, 0.5 * seed, 3.0 + 0.1 * seed, seed) for seed in range(3)]
    same = [on_own_text("agent", seed, 0.0, 3.0 + 0.1 * seed, 0) for seed in range(3)]
    own, usual = Comparison(harder), Comparison(same)
    for half in ("search", "text"):
        assert loss_over_dense(own, "agent", half) == pytest.approx(loss_over_dense(usual, "agent", half))
        assert regret(own, "agent", half) == pytest.approx(regret(usual, "agent", half))
    for curve, expected in zip(own.curves("agent"), usual.curves("agent"), strict=True):
        assert np.array(curve) == pytest.approx(np.array(expected))


def test_seeds_of_other_search_text_that_is_not_their_own_or_of_another_report_are_refused():
    with pytest.raises(ValueError, match="their evaluation differ"):
        Comparison([on_own_text("agent", 0, 0.0, 3.0, 0), on_own_text("agent", 1, 0.0, 3.0, 7)])
    other = on_own_text("agent", 1, 0.0, 3.0, 1)
    other["results"]["dense"]["text"] -= 0.1
    with pytest.raises(ValueError, match="their dense differ"):
        Comparison([on_own_text("agent", 0, 0.0, 3.0, 0), other])
