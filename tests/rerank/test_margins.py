"""Margins by layer, on scores whose movement is known."""

import numpy as np
import pytest

from rap_env.errors import RankingFailed, RecordUnreadable
from rap_env.rerank.margins import MarginRule, score_noise
from rap_env.rerank.selection import Decision, replay

WALKS = [np.cumsum(np.random.default_rng(seed).normal(size=(6, 8)), axis=0) for seed in range(500)]
SCORES = np.array([5.0, 1.0, 4.0, 2.5])


def test_noise_is_what_differences_still_move_by():
    left = np.sqrt(2.0 * np.arange(5, 0, -1))  # of two walks, each with so many steps of size 1 to go
    # A walk's first position says as much about the last one as its slope of 1 lets it: the noise is that of the steps.
    assert score_noise(WALKS) == pytest.approx([*left, 0.0], rel=0.1)


def test_noise_is_in_units_of_the_layers_own_scores():
    units = np.array([1.0, 3.0, 0.5, 2.0, 1.0, 1.0])[:, None]
    assert score_noise([path * units for path in WALKS]) == pytest.approx(score_noise(WALKS) * units[:, 0])
    assert score_noise([path + units for path in WALKS]) == pytest.approx(score_noise(WALKS)), "differences count"


def test_requests_of_other_sizes_count_by_their_pairs():
    few = [path[:, :2] for path in WALKS[:250]]
    assert score_noise([*few, *WALKS[250:]]) == pytest.approx(score_noise(WALKS), rel=0.1)


def test_layers_that_say_nothing_have_infinite_noise_and_let_nobody_leave():
    against, constant = np.array([[2.0, 1.0, 0.0]]), np.array([[7.0, 7.0, 7.0]])
    path = np.concatenate([against, constant, -against])
    noise = score_noise([path])
    assert noise.tolist() == [np.inf, np.inf, 0.0]
    assert replay(path, MarginRule(tuple(noise), 0.01), 1).layers == (3, 3, 3)


def test_who_is_a_margin_away_from_the_border_leaves():
    rule = MarginRule((1.0, 0.5), 2.0)
    assert rule.decide(0, SCORES, 2) == Decision(selected=(0,), dropped=(1,), deferred=(2, 3))
    assert rule.decide(1, SCORES, 2) == Decision(selected=(0, 2), dropped=(3, 1)), "1.5 between them is 3 noises"
    assert rule.decide(0, SCORES, 1) == Decision(dropped=(3, 1), deferred=(0, 2))


def test_a_wider_margin_reads_no_less_and_agrees_no_less():
    noise, layers, agreement = tuple(score_noise(WALKS)), [], []
    for margin in (0.1, 0.5, 1.0, 2.0, 1e9):
        ranked = [replay(path, MarginRule(noise, margin), 3) for path in WALKS]
        layers.append(np.mean([each.layers for each in ranked]))
        full = [set(np.argsort(-path[-1])[:3]) for path in WALKS]
        agreement.append(np.mean([len(own & set(each.ids)) / 3 for own, each in zip(full, ranked, strict=True)]))
    assert layers == sorted(layers) and layers[0] < 3 and layers[-1] == 6
    assert agreement == sorted(agreement) and agreement[-1] == 1.0


@pytest.mark.parametrize(("noise", "margin"), [((1.0,), 0.0), ((1.0,), np.nan), ((-1.0,), 1.0), ((np.nan,), 1.0)])
def test_margins_that_mean_nothing_are_refused(noise, margin):
    with pytest.raises(RankingFailed, match="positive margin and no negative noise"):
        MarginRule(noise, margin)


def test_a_model_of_more_layers_is_refused():
    with pytest.raises(RankingFailed, match="a model of 2 layers; got a decision after layer 2"):
        MarginRule((1.0, 0.5), 2.0).decide(2, SCORES, 2)


@pytest.mark.parametrize("paths", [[], [np.ones((3, 1))], [np.ones((3, 2)), np.ones((2, 2))]])
def test_noise_needs_requests_of_one_model_with_something_to_tell_apart(paths):
    with pytest.raises(RankingFailed, match="two candidates or more, and as many layers"):
        score_noise(paths)


def test_the_packaged_margins_have_a_noise_for_each_layer_of_the_embedded_model():
    rule = MarginRule.load()
    assert len(rule.noise) == 30 and rule.noise[-1] == 0.0 and 0 < rule.margin < 100


@pytest.mark.parametrize(
    "text", ["", "[]", '{"margin": 1.0}', '{"margin": 0, "noise": [1.0]}', '{"margin": 1, "noise": "a"}']
)
def test_a_file_without_margins_is_named(tmp_path, text):
    (tmp_path / "margins.json").write_text(text)
    with pytest.raises(RecordUnreadable, match=r"margins\.json: not margins by layer"):
        MarginRule.load(tmp_path / "margins.json")
