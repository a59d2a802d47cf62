"""The published rule, on scores whose clusters are found by hand."""

import itertools

import numpy as np
import pytest

from rap_env.errors import RankingFailed
from rap_env.rerank.clusters import ClusterRule, best_clusters
from rap_env.rerank.selection import Decision

THREE_GROUPS = np.array([9.0, 1.0, 5.0, 9.2, 1.1, 5.2, 0.9])  # {0, 3} above {2, 5} above {1, 4, 6}


def parts(decision: Decision) -> tuple[set[int], set[int], set[int]]:
    return set(decision.selected), set(decision.dropped), set(decision.deferred)


def test_clusters_are_those_that_one_sees_the_highest_first():
    assert best_clusters(THREE_GROUPS, 4) == [[0, 3], [2, 5], [1, 4, 6]]
    assert best_clusters(np.array([1.0, 2.0]), 4) == [[1], [0]]
    assert best_clusters(-THREE_GROUPS, 4) == [[1, 4, 6], [2, 5], [0, 3]]


def test_the_number_of_clusters_is_bounded():
    assert len(best_clusters(THREE_GROUPS, 2)) == 2


def test_equal_scores_are_never_parted():
    assert best_clusters(np.array([2.0, 2.0, 2.0, 1.0]), 4) == [[0, 1, 2], [3]]


def test_two_clusters_have_the_least_sum_of_squares_of_all_cuts():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = np.sort(rng.normal(size=8)) + 1e6  # far from 0, where squares would round
        above, _below = best_clusters(scores, 2)
        squares = [sum(((part - part.mean()) ** 2).sum() for part in np.split(scores, [cut])) for cut in range(1, 8)]
        assert len(above) == 8 - (1 + int(np.argmin(squares)))


def test_k_clusters_have_the_least_sum_of_squares_of_all_cuts():
    scores = np.random.default_rng(1).normal(size=9)
    values = np.sort(scores)

    def squares(cuts):
        return sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts))

    best = {k: min(squares(cuts) for cuts in itertools.combinations(range(1, 9), k - 1)) for k in (2, 3, 4)}
    for k in (2, 3, 4):
        clusters = best_clusters(scores, k)  # of at most k
        found = sum(((scores[own] - scores[own].mean()) ** 2).sum() for own in clusters)
        assert found == pytest.approx(best[len(clusters)])


@pytest.mark.parametrize(
    ("n_open", "expected"),
    [
        (1, (set(), {1, 2, 4, 5, 6}, {0, 3})),  # the only place is in the highest cluster: all below it are out
        (2, ({0, 3}, {1, 2, 4, 5, 6}, set())),  # it just fills the places: the end
        (3, ({0, 3}, {1, 4, 6}, {2, 5})),
        (4, ({0, 3, 2, 5}, {1, 4, 6}, set())),
        (5, ({0, 3, 2, 5}, set(), {1, 4, 6})),
        (6, ({0, 3, 2, 5}, set(), {1, 4, 6})),
    ],
)
def test_who_is_selected_dropped_and_deferred(n_open, expected):
    assert parts(ClusterRule(threshold=0.1).decide(0, THREE_GROUPS, n_open)) == expected


@pytest.mark.parametrize("n_open", [1, 2, 3, 4])
def test_where_the_order_matters_candidates_are_only_dropped(n_open):
    decision = ClusterRule(threshold=0.1, keeps_order=True).decide(0, THREE_GROUPS, n_open)
    assert decision.selected == ()
    assert set(decision.dropped) == ({1, 2, 4, 5, 6} if n_open <= 2 else {1, 4, 6})


def test_the_gate_is_the_coefficient_of_variation():
    scores = np.array([1.0, 3.0])  # standard deviation 1, mean 2
    assert parts(ClusterRule(threshold=0.5).decide(0, scores, 1)) == (set(), set(), {0, 1})
    assert parts(ClusterRule(threshold=0.49).decide(0, scores, 1)) == ({1}, {0}, set())
    assert parts(ClusterRule(threshold=0.49).decide(0, -scores, 1)) == ({0}, {1}, set())
    assert parts(ClusterRule(threshold=1e9).decide(0, scores - 2, 1)) == ({1}, {0}, set())  # a mean of 0


def test_nobody_leaves_before_the_first_layer_that_may_part_them():
    rule = ClusterRule(threshold=0.1, first_layer=3)
    assert [bool(rule.decide(layer, THREE_GROUPS, 2).dropped) for layer in range(5)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("scores", [np.zeros(4), np.full(4, -3.5)])
def test_equal_scores_go_on_whatever_the_threshold(scores):
    assert parts(ClusterRule(threshold=0).decide(0, scores, 2)) == (set(), set(), {0, 1, 2, 3})


def test_as_many_candidates_as_places_go_on():
    assert parts(ClusterRule(threshold=0).decide(0, np.array([1.0, 2.0]), 2)) == (set(), set(), {0, 1})


@pytest.mark.parametrize("options", [{"threshold": -0.1}, {"threshold": np.nan}, {"threshold": 1, "max_clusters": 1}])
def test_a_rule_that_could_not_decide_is_refused(options):
    with pytest.raises(RankingFailed, match="expected a threshold of at least 0 and at least 2 clusters"):
        ClusterRule(**options)
