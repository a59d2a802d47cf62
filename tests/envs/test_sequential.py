"""`rap/SequentialPruning-v0` drops one component a step, pays at the end, and can measure its ranking anew."""

import gymnasium
import numpy as np
import pytest
import torch
from numpy.testing import assert_equal

from rap_env.errors import InvalidMask
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import CALIBRATION
from rap_env.importance.source import ImportanceSource


@pytest.fixture
def sequential(make, scenario):
    """Makes a sequential environment that is reset to the scenario."""

    def start(**arguments) -> gymnasium.Env:
        env = make("rap/SequentialPruning-v0", **arguments).unwrapped
        env.reset(seed=0, options={"scenario": scenario})
        return env

    return start


@pytest.mark.parametrize("action", [-1, 9, np.int64(-1), np.int32(9), np.array(-1), 2**70, 1.0, np.float32(2.0), None])
def test_an_action_that_names_nothing_is_refused_and_changes_nothing(sequential, action):
    env = sequential()
    with pytest.raises(InvalidMask, match="expected an action from 0 to 8; got"):
        env.step(action)
    assert not env.step(0)[4]["mask"].keeps("layer0.attention")
    assert env.case[0].keep.count(False) == 1


@pytest.mark.parametrize("action", [3, np.int64(3), np.int32(3), np.uint8(3), np.array(3)])
def test_any_kind_of_integer_is_an_action(sequential, action):
    assert [component.name for component in sequential().step(action)[4]["mask"].dropped] == ["layer1.mlp"]


def test_what_is_kept_may_be_dropped_and_stopping_waits_for_the_budget(sequential):
    env = sequential()
    assert env.action_masks().tolist() == [True] * 8 + [False]
    env.step(3)
    assert env.action_masks().tolist() == [True] * 3 + [False] + [True] * 4 + [False]
    env.step(0)
    _, _, _, _, info = env.step(2)  # two attentions and an MLP free 311,296 of 738,560 bytes, more than a quarter
    assert info["overshoot_bytes"] == 0
    assert env.action_masks().tolist() == [False] * 8 + [True]


def test_stopping_above_the_budget_ends_the_episode_and_pays_for_the_overshoot(sequential):
    _, reward, terminated, truncated, info = sequential().step(8)
    assert terminated and not truncated
    assert reward == pytest.approx(1.0 - 2 * (1 / 0.75 - 1), abs=1e-4)
    assert info["reward_terms"]["violation"] == 1.0


def test_dropping_pays_nothing_until_the_agent_stops(sequential):
    env = sequential()
    assert [env.step(action)[1] for action in (0, 2, 4)] == [0.0] * 3
    assert env.problem.evaluator.calls == 0
    _, reward, terminated, _, info = env.step(8)
    assert terminated and info["overshoot_bytes"] == 0
    assert reward == pytest.approx(1 - (1 + 3 + 5) / 36)


def test_dropping_what_is_dropped_changes_nothing(sequential):
    env = sequential()
    before = env.step(1)
    after = env.step(1)
    assert_equal(after[0], before[0])
    assert after[1:4] == (0.0, False, False)
    assert after[4]["mask"] == before[4]["mask"]


def test_episode_is_cut_and_evaluated_after_twice_as_many_steps_as_components(sequential):
    env = sequential()
    steps = [env.step(0) for _ in range(16)]
    assert [step[2] for step in steps] == [False] * 16
    assert [step[3] for step in steps] == [False] * 15 + [True]
    assert [step[1] for step in steps[:-1]] == [0.0] * 15
    assert steps[-1][1] == pytest.approx(env.problem.reward(steps[-1][4]["outcome"]))


def test_episode_ends_when_nothing_is_left_to_drop(sequential):
    env = sequential()
    steps = [env.step(action) for action in range(8)]
    assert [step[2] for step in steps] == [False] * 7 + [True]
    assert steps[-1][1] == pytest.approx(0.0, abs=1e-9)  # the toy score of nothing


def brute_force_order(llm, mask, windows: torch.Tensor, static: tuple[str, ...]) -> list[str]:
    """Dropped components, then kept ones by the loss of transformers' own forward without them."""
    losses = {}
    for component in mask.kept:
        with llm.pruned(mask.drop(component)), torch.inference_mode():
            losses[component.name] = llm.model(windows, labels=windows).loss.item()
    return [name for name in static if name not in losses] + sorted(losses, key=losses.__getitem__)


def test_current_ranking_is_the_brute_force_one_and_is_stored(sequential, tiny_llm, tmp_path, monkeypatch):
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    names = [component.name for component in tiny_llm.shape.components]
    with ResultStore(tmp_path / "results.db") as store:
        source = ImportanceSource(names, Meter(tiny_llm, PerplexityEvaluator(windows, CALIBRATION), store))
        env = sequential(gsi="current", importance=source)
        rankings = [env.step(action)[0]["gsi_ranking"] for action in (6, 1, 3)]
        mask = env.reset(seed=0)[1]["mask"].drop(names[6])
        for action, ranking in zip((1, 3, None), rankings, strict=True):
            order = brute_force_order(tiny_llm, mask, windows, source.static)
            assert ranking == pytest.approx([order.index(name) / 7 for name in names])
            mask = mask if action is None else mask.drop(names[action])
        assert len(store) > 0
        monkeypatch.setattr(tiny_llm, "run", lambda *_: pytest.fail("the ranking was measured again"))
        again = ImportanceSource(names, Meter(tiny_llm, PerplexityEvaluator(windows, CALIBRATION), store))
        assert again.current(mask) == source.current(mask)
