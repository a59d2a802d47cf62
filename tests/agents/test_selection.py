"""Rules and learners in `rap/Selection-v0`."""

import numpy as np
import pytest

from agents.selection_learners import ALGORITHMS, learn
from agents.selection_rivals import PUBLISHED, FixedCut, Unchanged, rivals
from rap_env.envs.selection import SelectionEnv
from rap_env.errors import UnknownName
from rap_env.rerank.choosing import Choosing
from rap_env.rerank.cuts import CUTS, Cut
from rap_env.rerank.margins import score_noise
from rap_env.rerank.outcomes import replayed
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.selection import replay
from rap_env.rerank.synthetic import synthetic_paths
from rap_env.rng import global_states

PATHS = synthetic_paths(20, n_candidates=12, n_layers=8)


def test_a_fixed_cut_waits_for_its_layer():
    path = np.array([[9.0, 1.0, 0.0]] * 4)
    for layer in range(3):
        assert replay(path, FixedCut(Cut(False, True, 1.0), layer, np.ones(4)), 1).layers == (layer + 1,) * 3
    assert replay(path, FixedCut(Cut(False, True, 9.5), 0, np.ones(4)), 1).layers == (4,) * 3


def test_a_request_ends_when_the_best_did_not_change_for_some_layers():
    path = np.array(
        [[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [2.0, 3.0, 1.0], [0.0, 9.0, 1.0], [1.0, 0.0, 9.0]]
    )
    one, two = Unchanged(1), Unchanged(2)
    for _ in range(2):  # a rule begins anew with each request
        assert replay(path, one, 1).ids == (0,) and replay(path, one, 1).layers == (2,) * 3
        assert replay(path, two, 1).ids == (1,) and replay(path, two, 1).layers == (5,) * 3
    assert replay(path, one, 2).layers == (6,) * 3  # {0, 1}, {0, 2}, {1, 2}, {0, 1}, {1, 2}: never twice the same


def test_all_settings_of_all_rules_make_rankings_and_some_of_each_read_less():
    rules = rivals(PATHS.spreads(), score_noise(PATHS.scores))
    for name, settings in rules.items():
        found = [replayed(PATHS.scores[0], PATHS.tokens[0], one.decider, 5) for one in settings]
        assert min(one.compute for one in found) < 1.0, name
        assert len({tuple(one.values.items()) for one in settings}) == len(settings)
    assert replayed(PATHS.scores[0], PATHS.tokens[0], rules[PUBLISHED][-1].decider, 5).compute == 1.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learners_decide_as_they_were_trained_and_leave_global_random_state_alone(algorithm):
    before, steps = repr(global_states()["python"]), []
    learned = [learn(algorithm, lambda: SelectionEnv(PATHS), 64, 1, lambda policy: 0.0, steps.append) for _ in range(2)]
    assert repr(global_states()["python"]) == before and steps[-1] >= 64
    rankings = [
        [replay(path, Choosing(one.choose, PATHS.spreads()), 5) for path in PATHS.scores]
        for one in (*learned, learned[0])
    ]
    assert rankings[0] == rankings[1] == rankings[2]


def test_the_network_that_validates_best_is_returned():
    values, weights = iter([3.0, 2.0]), []  # after each of two rollouts

    def validate(policy) -> float:
        weights.append(policy.model.policy.action_net.weight.tolist())
        return next(values)

    learned = learn("ppo", lambda: SelectionEnv(PATHS), 2 * 2048, 0, validate)
    assert learned.model.policy.action_net.weight.tolist() == weights[0] != weights[1] and len(weights) == 2


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(UnknownName, match="algorithm 'pqo'"):
        learn("pqo", SelectionEnv, 1, 0, lambda policy: 0.0)


def test_ppo_learns_to_stop_where_the_first_layer_tells_all():
    """Scores never change: stopping at once loses nothing, and reading on costs."""
    rng = np.random.default_rng(0)
    scores = tuple(np.repeat(rng.normal(size=(1, 8)), 6, axis=0) for _ in range(30))
    tokens, grades = tuple(np.full(8, 50) for _ in range(30)), tuple(np.full(8, np.nan) for _ in range(30))
    paths = ScorePaths(tuple(map(str, range(30))), scores, tokens, grades, {})

    def compute(policy) -> float:
        decider = Choosing(policy.choose, paths.spreads())
        return np.mean([replayed(path, tokens[0], decider, 3).compute for path in scores])

    learned = learn("ppo", lambda: SelectionEnv(paths, top_ks=[3]), 16_384, 0, lambda policy: -compute(policy))
    assert compute(learned) == pytest.approx(1 / 6)
    assert CUTS[learned.choose(SelectionEnv(paths, top_ks=[3]).reset(seed=0)[0])] != CUTS[0]
