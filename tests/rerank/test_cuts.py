"""Cuts are valid decisions whatever the scores, and features say what they should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rap_env.errors import RankingFailed
from rap_env.rerank.choosing import Choosing
from rap_env.rerank.cuts import CUTS, GO_ON, STOP, Cut
from rap_env.rerank.features import N_FEATURES, Features
from rap_env.rerank.selection import Decision, replay

SCORES = np.array([0.0, 5.0, 3.0, 4.0, 2.9, -1.0])  # best first: 1, 3, 2, 4, 0, 5


def test_cuts_by_hand():
    assert GO_ON.decision(SCORES, 2, 1.0) == Decision(deferred=(1, 3, 2, 4, 0, 5))
    assert STOP.decision(SCORES, 2, 1.0) == Decision((1, 3), (2, 4, 0, 5))
    assert Cut(False, True, 1.5).decision(SCORES, 2, 2.0) == Decision((), (0, 5), (1, 3, 2, 4))  # below 4 - 3
    assert Cut(True, False, 1.0).decision(SCORES, 2, 2.0) == Decision((1,), (), (3, 2, 4, 0, 5))  # from 3 + 2 on
    assert Cut(True, True, 1.05).decision(SCORES, 2, 1.0) == Decision((1,), (4, 0, 5), (3, 2))
    assert Cut(False, True, 1.0).decision(SCORES, 2, 1.0) == STOP.decision(SCORES, 2, 1.0)  # 4 and 3 are so far apart
    assert Cut(True, False, 2.0).decision(SCORES[:2], 2, 1.0) == Decision((1, 0))


def test_equal_scores_are_never_parted_by_a_margin_but_by_a_stop():
    equal = np.ones(4)
    for cut in CUTS:
        expected = Decision((0, 1), (2, 3)) if cut == STOP else Decision(deferred=(0, 1, 2, 3))
        assert cut.decision(equal, 2, 1.0) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 9))
def test_any_choices_at_all_make_a_valid_ranking_with_features_in_bounds(seed, n_candidates, n_layers):
    rng = np.random.default_rng(seed)
    path = rng.normal(size=(n_layers, n_candidates)).round(int(rng.integers(0, 4))) * 10.0 ** rng.integers(-5, 6)
    top_k, seen = int(rng.integers(1, n_candidates + 2)), []

    def choose(observation: np.ndarray) -> int:
        seen.append(observation)
        return int(rng.integers(len(CUTS)))

    ranking = replay(path, Choosing(choose, 10.0 ** rng.uniform(-3, 3, n_layers)), top_k)
    assert len(set(ranking.ids)) == min(top_k, n_candidates)
    assert all(one.shape == (N_FEATURES,) and one.dtype == np.float32 for one in seen)
    assert all(np.isfinite(one).all() and one.min() >= 0 and one.max() <= 1 for one in seen)


def test_features_by_hand():
    features = Features(np.array([2.0, 1.0, 1.0, 1.0]), 8, 3)
    first = features.observe(0, 2 * SCORES, 2)
    above, below = [0.5, 1.5], [0.5, 0.6, 3.5, 4.0]  # around 3.5; the last one is clipped, and two are missing
    spread, mean = SCORES.std(), SCORES.mean()
    expected = [*(gap / 4 for gap in above), 1, 1, *(gap / 4 for gap in below)]
    expected += [spread / 4, spread / mean, 0.5 + (mean - 3.5) / 8, 6 / 8, 2 / 6, 3 / 8, 1 / 4, 0, 0, 0, 0]
    expected += [6 / 32, 6 * 3 / 32, 1, 1]
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    features.narrow(Decision((1,), (0, 5), (3, 2, 4)))  # 3 is the best of 2, 3 and 4; now it is the last
    second = features.observe(1, np.array([4.0, 3.0, 3.5]), 1)
    changes = np.array([1.0, -1.0, 0.6])
    np.testing.assert_allclose(
        second[-8:-2], [1.0, 0, 4 / 3 / 3, changes.std() / 4, (6 + 3) / 32, 3 * 2 / 32], rtol=1e-6
    )
    features.narrow(Decision((), (), (0, 1, 2)))
    assert features.observe(2, np.array([9.0, 3.0, 3.5]), 1)[-7] == 0.25, "the best did not change in one of 4 layers"


def test_a_model_with_more_layers_than_the_policy_knows_is_refused():
    with pytest.raises(RankingFailed, match="expected a model of 2 layers; got a decision after layer 1"):
        replay(np.zeros((3, 4)), Choosing(lambda seen: 0, np.ones(2)), 2)
