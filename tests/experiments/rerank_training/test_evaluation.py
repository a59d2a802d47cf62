"""NDCG@10, sums of scores, and intervals: worked out by hand."""

from math import log, log2

import numpy as np
import pytest

from experiments.report.rerank_training import rerank_teachers_table
from experiments.rerank_training.evaluation import best_weight, bootstrap_interval, compared, compared_sums, lines, ndcg
from experiments.rerank_training.rivals import Bm25, fused, summed

GRADES = {"q": {"a": 3, "b": 1, "missed": 2}}


def test_ndcg_is_the_discounted_sum_of_grades_over_the_best_possible():
    found = 1 / log2(2) + 3 / log2(4)  # b first, then one that nobody judged, then a
    best = 3 / log2(2) + 2 / log2(3) + 1 / log2(4)  # the document that is no candidate counts here
    assert ndcg(GRADES, {"q": {"b": 2.0, "unjudged": 1.0, "a": 0.5}}) == {"q": pytest.approx(found / best)}


def test_documents_after_the_tenth_count_nothing():
    others = {f"d{number}": 20.0 - number for number in range(10)}
    assert ndcg(GRADES, {"q": others | {"a": 1.0}}) == {"q": 0.0}


def test_the_interval_of_equal_differences_is_that_difference():
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_the_interval_is_about_two_standard_errors_to_each_side():
    values = np.random.default_rng(0).normal(0.1, 0.2, 400)
    low, high = bootstrap_interval(values.tolist())
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_a_fused_score_is_the_weighted_sum_of_standardised_scores():
    first, second = {"a": 1.0, "b": 3.0}, {"a": 10.0, "b": 0.0}  # standardised: -1, 1 and 1, -1
    assert fused(first, second, 0.25) == {"a": pytest.approx(-0.5), "b": pytest.approx(0.5)}
    assert fused(first, {"a": 7.0, "b": 7.0}, 0.5) == {"a": -0.5, "b": 0.5}, "equal scores say nothing"


def test_a_sum_of_three_weighs_each_after_standardising():
    scores = [{"a": 1.0, "b": 3.0}, {"a": 10.0, "b": 0.0}, {"a": -5.0, "b": 5.0}]
    assert summed(scores, (0.5, 0.3, 0.2)) == {"a": pytest.approx(-0.4), "b": pytest.approx(0.4)}


def test_sums_of_all_weights_are_compared_with_one_signal_alone():
    grades = {"q": {"a": 1}}
    right, wrong = {"q": {"a": 1.0, "b": 0.0}}, {"q": {"a": 0.0, "b": 1.0}}
    rows = compared_sums(grades, {"wrong": wrong, "right": right, "bad": wrong}, "bad")
    assert len(rows) == 66 and all(sum(row["weights"].values()) == pytest.approx(1) for row in rows)
    best = {tuple(row["weights"].values()): row["ndcg_at_10"] for row in rows}
    assert best[0.2, 0.6, 0.2] == 1.0 == rows[0]["ndcg_at_10"]
    assert best[0.3, 0.4, 0.3] == pytest.approx(1 / log2(3)) == rows[-1]["ndcg_at_10"]
    assert rows[0]["difference"] == pytest.approx(1 - 1 / log2(3)) and "by_query" not in rows[0]


def test_the_table_of_teachers_has_the_best_weights_of_each_choice_of_signals():
    def row(value, **weights):
        return {"weights": weights, "ndcg_at_10": value, "difference": value - 0.5, "interval": [0.0, 0.1]}

    sums = [row(0.6, bm25=0.4, encoder=0.6), row(0.55, bm25=0.5, encoder=0.5), row(0.5, bm25=0.0, encoder=1.0)]
    assert rerank_teachers_table({"results": {"sums": sums}}).rows == [
        ["0.4 bm25 + 0.6 encoder", "0.600", "+0.100 [+0.000, +0.100]"],
        ["1.0 encoder", "0.500", "+0.000 [+0.000, +0.100]"],
    ]


def test_the_best_weight_is_the_lowest_that_ranks_best():
    grades = {"q": {"a": 1}}
    right, wrong = {"q": {"a": 1.0, "b": 0.0}}, {"q": {"a": 0.0, "b": 1.0}}
    assert best_weight(grades, right, wrong) == 0.0
    assert best_weight(grades, wrong, right) == 0.6  # at 0.5 the sums are equal


def test_rows_hold_differences_to_the_baseline_query_by_query():
    grades = {"q": {"a": 1}, "r": {"a": 1}}
    good, bad = {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}
    rows = compared(grades, {"bm25": {"q": good, "r": bad}, "other": {"q": good, "r": good}}, "bm25")
    second = 1 / log2(3)
    assert rows["bm25"]["by_query"] == {"q": 1.0, "r": pytest.approx(second)}
    assert rows["other"]["difference"] == pytest.approx((1 - second) / 2)
    assert rows["other"]["interval"] == (pytest.approx(0.0), pytest.approx(1 - second))
    assert lines(rows)[2].split() == ["other", "1.0000", "+0.1845", "(+0.0000,", "+0.3691)"]


def test_bm25_returns_only_documents_that_share_a_word_best_first():
    bm25 = Bm25({"a": "lift of a wing", "b": "wing wing wing lift", "c": "heat transfer"})
    found = bm25.best("lift wing", 10)
    assert set(found) == {"a", "b"}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert list(bm25.best("lift wing", 1)) == list(found)[:1]


def test_bm25_scores_texts_of_the_collection_as_its_index_does_and_others_too():
    texts = {"a": "lift of a wing", "b": "wing wing wing lift", "c": "heat transfer"}
    bm25 = Bm25(texts)
    found = bm25.best("lift wing lift", 10)
    assert bm25.scores("lift wing lift", [texts[name] for name in found]) == pytest.approx(list(found.values()))
    rarity = log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # of "lift", in two of three documents of 2, 4 and 2 words
    expected = rarity * 1 / (1 + 1.5 * (0.25 + 0.75 * 4 / (8 / 3)))
    assert bm25.scores("lift", ["lift heat heat heat", "heat", ""]) == [pytest.approx(expected), 0, 0]
