"""The comparison of learners with rules: matched agreement, the split, the gate, the record and its table."""

import numpy as np
import pytest

from agents.selection_rivals import PUBLISHED
from experiments.records import read_record
from experiments.report.docs import rewritten
from experiments.rerank_training.data import Split
from experiments.selection_learners import Plan, _wins, compare, main, parts_of
from experiments.selection_matching import (
    Outcomes,
    cheapest,
    compute_at,
    frontier,
    matched_difference,
    outcomes,
)
from rap_env.errors import InvalidConfig
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.synthetic import synthetic_paths


def made(agreement, compute) -> Outcomes:
    compute = np.asarray(compute, float)
    return Outcomes(np.asarray(agreement, float), compute, compute)


def test_the_frontier_has_no_setting_that_a_coin_toss_beats():
    agreement = np.array([0.5, 0.9, 0.7, 0.7, 0.4, 0.9])
    compute = np.array([0.1, 0.5, 0.4, 0.2, 0.1, 0.6])
    assert frontier(agreement, compute) == [0, 3, 1]
    assert frontier(np.array([0.5, 0.7, 0.9]), np.array([0.1, 0.4, 0.5])) == [0, 2]


def test_compute_at_an_agreement_lies_between_settings_and_reading_everything():
    agreement, compute = np.array([0.5, 0.9]), np.array([0.1, 0.5])
    assert compute_at(agreement, compute, 0.7) == pytest.approx(0.3)
    assert compute_at(agreement, compute, 0.95) == pytest.approx(0.75)
    assert (compute_at(agreement, compute, 1.0), compute_at(agreement, compute, 0.2)) == (1.0, 0.1)


def test_a_matched_difference_by_hand():
    rule = made([[0.5] * 4, [0.9] * 4], [[0.1] * 4, [0.5] * 4])
    found = matched_difference(made([[0.7] * 4] * 3, [[0.25] * 4] * 3), rule, 50)
    assert found == pytest.approx({"mean": -0.05, "low": -0.05, "high": -0.05, "rule_compute": 0.3})


def test_an_interval_is_as_wide_as_queries_and_seeds_say():
    rng = np.random.default_rng(0)
    noise, ones = rng.normal(0.0, 0.1, 400), np.full((1, 400), 0.9)
    rule = made(ones, ones - 0.4)
    found = matched_difference(made(ones, 0.4 + noise[None]), rule)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)
    paired = matched_difference(made(ones, 0.4 + noise[None]), made(ones, 0.5 + noise[None]))
    assert paired["high"] - paired["low"] < 1e-9 and paired["mean"] == pytest.approx(-0.1)
    seeds = matched_difference(made(np.repeat(ones, 3, 0), np.repeat([[0.3], [0.5], [0.7]], 400, 1)), rule)
    assert seeds["low"] == pytest.approx(-0.2) and seeds["high"] == pytest.approx(0.2)


def test_the_cheapest_that_reaches_the_target_is_chosen():
    found = made([[0.9], [0.95], [0.99], [1.0]], [[0.1], [0.4], [0.3], [0.9]])
    assert cheapest(found, 0.94) == (2, True) and cheapest(found, 0.9) == (0, True)
    assert cheapest(found.part([0, 1]), 0.99) == (1, False)


def test_a_query_in_two_parts_is_refused():
    paths = synthetic_paths(6, n_candidates=4, n_layers=3)
    names = paths.queries
    parts = parts_of(paths, Split(names[:2], names[2:4], names[4:]))
    assert parts.report.queries == names[4:] and parts.training.queries == names[:2]
    with pytest.raises(InvalidConfig, match="query 'drawn 1' of the report part is in the training part, too"):
        parts_of(paths, Split(names[:2], names[2:4], names[1:2]))
    copied = ScorePaths(names, (*paths.scores[:5], paths.scores[3]), paths.tokens, paths.grades, {})
    with pytest.raises(InvalidConfig, match="query 'drawn 5' of the report part is in the validation part, too"):
        parts_of(copied, Split(names[:2], names[2:4], names[4:]))


def test_queries_with_too_few_candidates_are_left_out_and_none_left_is_refused():
    few, many = synthetic_paths(2, 5, 4), synthetic_paths(2, 9, 4, seed=1)
    columns = (getattr(few, name) + getattr(many, name) for name in ("scores", "tokens", "grades"))
    paths = ScorePaths(("a", "b", "c", "d"), *columns, {})
    assert outcomes(paths, [None], 5).agreement.shape == (1, 2) and outcomes(paths, [None], 4).compute.shape == (1, 4)
    with pytest.raises(InvalidConfig, match="expected queries with more than 9 candidates"):
        outcomes(paths, [None], 9)


def test_the_gate_needs_the_target_enough_queries_and_an_interval_below_zero_for_every_rule():
    def found(reaches=True, queries=50, high=-0.1) -> dict:
        one = {"queries": queries, "minus": {PUBLISHED: {"high": -0.2}, "other": {"high": high}}}
        return {"reaches_target": reaches, "price": 0.1, "prices": {"0.1": one}}

    assert _wins(found())
    assert not (_wins(found(reaches=False)) or _wins(found(queries=49)) or _wins(found(high=0.0)))


def test_a_run_writes_one_record_with_all_that_it_compared(tmp_path, capsys):
    file, path = synthetic_paths(20, n_candidates=8, n_layers=6).save(tmp_path / "paths.npz"), tmp_path / "record.json"
    arguments = [str(file), str(path), "--seeds", "0", "1", "--prices", "0.5", "--top-ks", "1", "5"]
    main(
        [
            *arguments,
            "--candidates",
            "7",
            "--validation-share",
            "0.2",
            "--report-share",
            "0.4",
            "--ppo-steps",
            "64",
            "--dqn-steps",
            "64",
        ]
    )
    record = read_record(path)
    config, results = record["config"], record["results"]
    split = [set(config["split"][name]) for name in ("training", "validation", "report")]
    assert [len(part) for part in split] == [8, 4, 8] and len(set.union(*split)) == 20
    assert config["candidates"] == 7 and config["seeds"] == [0, 1]
    assert config["paths"]["provenance"]["synthetic"] and config["target"] == 0.992
    assert set(results["learned"]) == {"ppo", "dqn"} and set(results["learned"]["ppo"]) == {"1", "5"}
    one = results["learned"]["dqn"]["5"]["prices"]["0.5"]
    assert len(one["of_seeds"]["agreement"]) == 2 and set(one["minus"]) == set(results["rules"])
    assert results["rules"][PUBLISHED]["1"]["tuning"]["agreement"] >= 0.992
    assert results["wins"] == {"ppo": {"1": False, "5": False}, "dqn": {"1": False, "5": False}}
    table = rewritten("<!-- table: record.json selection_learners -->\n<!-- end -->\n", tmp_path)
    assert len(table.splitlines()) == 2 + 2 + 2 * (5 + 2) and table.splitlines()[1] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(arguments)
    assert "records are written once" in capsys.readouterr().err


def test_nothing_to_compare_is_refused():
    paths = synthetic_paths(6, n_candidates=4, n_layers=3)
    parts = parts_of(paths, Split(paths.queries[:2], paths.queries[2:4], paths.queries[4:]))
    with pytest.raises(InvalidConfig, match="expected at least one algorithm, price, seed and K"):
        compare(parts, Plan({}, [0.1], [0]))
