"""Requests replayed on recorded scores, by hand."""

import numpy as np
import pytest

from rap_env.errors import RankingFailed
from rap_env.rerank.clusters import ClusterRule
from rap_env.rerank.selection import Decision, Ranking, Selection, replay

# Three layers; after the first 0 and 3 are far above, after the second 2 is above 1.
PATH = np.array([[9.0, 5.0, 5.2, 9.2, 1.0, 1.1], [0.0, 3.0, 8.0, 0.0, 0.0, 0.0], [4.0, 1.0, 2.0, 3.0, 9.0, 9.0]])


class Fixed:
    """Decides as it was told, layer by layer, then defers."""

    def __init__(self, *decisions: Decision) -> None:
        self.decisions, self.seen = list(decisions), []

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        self.seen.append((layer, scores.tolist(), n_open))
        return self.decisions.pop(0) if self.decisions else Decision(deferred=tuple(range(len(scores))))


def test_without_a_decider_the_last_layer_ranks_everybody():
    assert replay(PATH, None, 3) == Ranking((4, 5, 0), (4.0, 1.0, 2.0, 3.0, 9.0, 9.0), (3,) * 6)
    assert replay(PATH, None, None).ids == (4, 5, 0, 3, 2, 1)  # of equal scores the first document is the first


def test_candidates_leave_layer_by_layer_and_the_places_are_filled_in_order():
    ranking = replay(PATH, ClusterRule(threshold=0.1), 3)
    assert ranking.ids == (3, 0, 2)  # selected after layer 0 by 9.2 > 9.0, then after layer 1
    assert ranking.layers == (1, 2, 2, 1, 1, 1)
    assert ranking.scores == (9.0, 3.0, 8.0, 9.2, 1.0, 1.1)


def test_where_the_order_matters_the_last_layer_orders_what_is_left():
    ranking = replay(PATH, ClusterRule(threshold=0.1, keeps_order=True), 3)
    assert ranking.layers == (3, 3, 3, 3, 1, 1)  # after layer 1 there are {2} and {0, 1, 3}, where two more are wanted
    assert ranking.ids == (0, 3, 2)


def test_a_decider_sees_who_is_left_and_how_many_places_are_open():
    decider = Fixed(Decision((3,), (4, 5), (0, 1, 2)))
    assert replay(PATH, decider, 2).ids == (3, 0)  # 0 has the best last score of those that went on
    assert decider.seen == [(0, PATH[0].tolist(), 2), (1, [0.0, 3.0, 8.0], 1)]


@pytest.mark.parametrize("top_k", [None, 6, 7])
def test_with_a_place_for_everybody_all_are_ranked_by_the_last_layer(top_k):
    decider = Fixed()
    assert replay(PATH, decider, top_k) == replay(PATH, None, None) and decider.seen == []


def test_a_single_candidate_is_ranked():
    assert replay(PATH[:, :1], ClusterRule(threshold=0.1), 1) == Ranking((0,), (4.0,), (3,))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_told_with_layer_and_documents(value):
    path = PATH.copy()
    path[2, [1, 4]] = value
    with pytest.raises(RankingFailed, match=r"after layer 2 the scores of the documents \[1, 4\] are not finite"):
        replay(path, None, 2)


@pytest.mark.parametrize(
    "decision",
    [
        Decision((0,), (1, 2), (3, 4)),  # where is 5?
        Decision((0,), (0, 1, 2), (3, 4, 5)),  # 0 twice
        Decision((0, 1, 2), (3, 4, 5), ()),  # three for two places
        Decision((0, 1), (), (2, 3, 4, 5)),  # they would be read for nothing
        Decision((), (0, 1, 2, 3, 4), (5,)),  # one for two places
    ],
)
def test_decisions_that_leave_places_open_or_candidates_out_are_refused(decision):
    with pytest.raises(RankingFailed, match="expected a decision"):
        replay(PATH, Fixed(decision), 2)


def test_scores_are_asked_for_only_where_they_decide():
    assert [Selection(6, 2, 3, None).needs_scores(layer) for layer in range(3)] == [False, False, True]
    assert [Selection(6, 2, 3, Fixed()).needs_scores(layer) for layer in range(3)] == [True] * 3
    assert [Selection(6, 6, 3, Fixed()).needs_scores(layer) for layer in range(3)] == [False, False, True]
