"""Vector environments live the lives of single ones, and ask the problem once a step."""

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.testing import assert_equal

import rap_env.envs.defaults
from rap_env.envs.defaults import Defaults
from rap_env.envs.vector import PruningVectorEnv, SequentialPruningVectorEnv, WidthVectorEnv
from rap_env.errors import InfeasibleBudget, InvalidMask, SearchExhausted
from rap_env.evaluation.meter import TokenBudget
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem

ONE_STEP, SEQUENTIAL = "rap/Pruning-v0", "rap/SequentialPruning-v0"
CLASSES = {ONE_STEP: PruningVectorEnv, SEQUENTIAL: SequentialPruningVectorEnv}
N_ENVS = 5
# every way in which an environment can differ: name, its own arguments
VARIANTS = [(ONE_STEP, {}), (SEQUENTIAL, {}), (SEQUENTIAL, {"gsi": "current"})]


class RuleImportance(ImportanceSource):
    """Measures nothing: with k components dropped the order is turned by k places."""

    def current(self, mask: PruningMask) -> tuple[str, ...]:
        k = len(mask.dropped)
        return self.static[k:] + self.static[:k]


@pytest.fixture
def parts(tiny_llm, toy_problem, toy_sampler):
    """Makes an environment's arguments, with a problem of its own."""
    importance = RuleImportance([component.name for component in tiny_llm.shape.components])

    def make_parts(budget: TokenBudget | None = None) -> dict:
        problem = PruningProblem(tiny_llm, type(toy_problem.evaluator)(), budget=budget)
        return {"problem": problem, "importance": importance, "sampler": toy_sampler}

    return make_parts


@pytest.fixture
def make(parts):
    """Makes a vector environment on the toy parts."""

    def make_vector(name: str, num_envs: int = N_ENVS, **arguments) -> PruningVectorEnv:
        return gymnasium.make_vec(name, num_envs=num_envs, **parts() | arguments)

    return make_vector


def serial(name: str, **arguments) -> SyncVectorEnv:
    """Gymnasium's own vector environment over the same single ones."""
    return SyncVectorEnv([lambda: gymnasium.make(name, **arguments)] * N_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)


def assert_infos_equal(left: dict, right: dict) -> None:
    last = [list(infos.pop("final_obs", [])) for infos in (left, right)]  # arrays of dictionaries of arrays
    assert_equal(*last)
    assert_equal(left, right)


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_rollouts_are_those_of_single_environments_one_after_the_other(make, parts, name, arguments):
    together, alone = make(name, **arguments), serial(name, **parts() | arguments)
    together.action_space.seed(7)
    (first, infos), (first_alone, infos_alone) = (envs.reset(seed=11) for envs in (together, alone))
    assert_equal(first, first_alone)
    assert_infos_equal(infos, infos_alone)
    ends = 0
    for _ in range(40):
        actions = together.action_space.sample()
        step, step_alone = together.step(actions), alone.step(actions)
        assert_equal(step[:4], step_alone[:4])
        assert [array.dtype for array in step[1:4]] == [array.dtype for array in step_alone[1:4]]
        assert_infos_equal(step[4], step_alone[4])
        assert together.observation_space.contains(step[0])
        ends += np.sum(step[2] | step[3])
    assert ends > 2 * N_ENVS, "autoreset was hardly tried"
    assert together.problem.budget.history == alone.envs[0].unwrapped.problem.budget.history


def test_widths_of_many_environments_are_those_of_single_ones(parts):
    arguments = {name: part for name, part in parts().items() if name != "importance"}
    together, alone = (
        gymnasium.make_vec("rap/Width-v0", num_envs=N_ENVS, **arguments),
        serial("rap/Width-v0", **arguments),
    )
    together.action_space.seed(7)
    assert type(together) is WidthVectorEnv
    assert_equal(together.reset(seed=11)[0], alone.reset(seed=11)[0])
    for _ in range(10):
        actions = together.action_space.sample()
        step, step_alone = together.step(actions), alone.step(actions)
        assert_equal(step[:4], step_alone[:4])
        assert_infos_equal(step[4], step_alone[4])
        assert step[2].all() and not step[4]["final_info"]["overshoot_bytes"].any()


def test_episodes_that_are_cut_are_evaluated_and_reset_like_the_others(make, parts):
    together, alone = make(SEQUENTIAL), serial(SEQUENTIAL, **parts())
    for envs in (together, alone):
        envs.reset(seed=0)
    for _ in range(16):  # twice as many as components, and nothing but the first is ever dropped
        step, step_alone = (envs.step(np.zeros(N_ENVS, dtype=int)) for envs in (together, alone))
    assert step[3].all() and not step[2].any()
    assert_equal(step[:4], step_alone[:4])
    assert_infos_equal(step[4], step_alone[4])
    assert step[0]["kept"].all()


@pytest.mark.parametrize("name", CLASSES)
def test_gymnasium_makes_it_by_name_with_its_spaces_and_autoreset_mode(make, name):
    for mode in (None, "vector_entry_point"):
        envs = make(name, vectorization_mode=mode)
        assert type(envs) is CLASSES[name] and envs.num_envs == N_ENVS and envs.spec.id == name
        assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    expected = Box(0, 1, (N_ENVS, 8), np.int8) if name == ONE_STEP else MultiDiscrete([9] * N_ENVS)
    assert envs.action_space == expected
    assert envs.observation_space["gsi_ranking"].shape == (N_ENVS, 8)
    assert envs.single_observation_space["memory_budget"].shape == (1,)
    assert isinstance(make(name, vectorization_mode="sync"), SyncVectorEnv)


@pytest.mark.parametrize("name", CLASSES)
def test_the_problem_is_asked_once_a_step(make, monkeypatch, name):
    envs = make(name)
    asked = []
    evaluate_many = envs.problem.evaluate_many
    monkeypatch.setattr(envs.problem, "evaluate_many", lambda cases: asked.append(len(cases)) or evaluate_many(cases))
    envs.reset(seed=0)
    envs.action_space.seed(0)
    ends = []
    for _ in range(20):
        _, _, terminations, truncations, _ = envs.step(envs.action_space.sample())
        ends.append(np.sum(terminations | truncations))
    assert asked == ends
    assert name == SEQUENTIAL or ends == [N_ENVS] * 20


def test_equal_masks_of_different_environments_are_measured_once(make):
    envs = make(ONE_STEP)
    envs.reset(seed=0)
    actions = np.ones((N_ENVS, 8), dtype=np.int8)
    actions[3, 2] = 0
    infos = envs.step(actions)[4]
    assert envs.problem.evaluator.calls == envs.problem.budget.spent == 2
    assert infos["final_info"]["tasks"]["toy"]["acc"] == pytest.approx([1, 1, 1, 1 - 3 / 36, 1])
    envs.step(actions)
    assert envs.problem.evaluator.calls == 2


def test_an_exhausted_token_budget_is_refused_before_anything_is_measured(make, parts):
    problem = parts(TokenBudget(limit=N_ENVS - 1))["problem"]
    envs = make(ONE_STEP, problem=problem)
    envs.reset(seed=0)
    actions = 1 - np.eye(N_ENVS, 8, dtype=np.int8)
    with pytest.raises(SearchExhausted, match="0 of 4 tokens are spent; 5 more were asked for"):
        envs.step(actions)
    assert problem.evaluator.calls == problem.budget.spent == 0
    with pytest.raises(ResetNeeded, match="call reset before the next step"):
        envs.step(actions)
    actions[0] = actions[1]
    envs.reset(seed=0)
    envs.step(actions)
    assert problem.evaluator.calls == problem.budget.spent == N_ENVS - 1


def test_a_finished_episode_is_told_about_beside_the_next_ones_start(make):
    envs = make(ONE_STEP)
    _, before = envs.reset(seed=0)
    actions = 1 - np.eye(N_ENVS, 8, dtype=np.int8)
    observations, rewards, terminations, truncations, infos = envs.step(actions)
    assert terminations.all() and not truncations.any()
    assert_equal(observations["kept"], np.ones((N_ENVS, 8)))
    assert_equal(np.stack([last["kept"] for last in infos["final_obs"]]), actions)
    last = infos["final_info"]
    assert_equal(last["scenario"], before["scenario"])
    assert not any(old == new for old, new in zip(before["scenario"], infos["scenario"], strict=True))
    assert rewards == pytest.approx([envs.problem.reward(outcome) for outcome in last["outcome"]])
    assert "outcome" not in infos


def test_infos_are_arrays_with_a_mask_for_every_key(make):
    envs = make(SEQUENTIAL)
    _, infos = envs.reset(seed=0)
    assert set(infos) == {f"{dash}{key}" for dash in ("", "_") for key in envs.envs[0].reset()[1]}
    assert infos["overshoot_bytes"].shape == infos["footprint"]["peak_bytes"].shape == (N_ENVS,)
    assert infos["_overshoot_bytes"].all() and infos["footprint"]["_peak_bytes"].all()
    _, rewards, terminations, _, infos = envs.step(np.array([0, 8, 1, 8, 2]))  # the second and the fourth stop
    stopped = [False, True, False, True, False]
    assert terminations.tolist() == infos["_final_info"].tolist() == infos["_final_obs"].tolist() == stopped
    assert (
        infos["final_info"]["_outcome"].tolist() == infos["final_info"]["reward_terms"]["_accuracy"].tolist() == stopped
    )
    assert infos["final_info"]["reward_terms"]["accuracy"].tolist() == [0, 1, 0, 1, 0]
    assert [mask.keep.count(False) for mask in infos["mask"]] == [1, 0, 1, 0, 1]
    assert_equal(rewards == 0.0, ~terminations)


def test_observations_of_a_step_are_not_changed_by_the_next(make):
    envs = make(SEQUENTIAL)
    first, _ = envs.reset(seed=0)
    envs.step(np.arange(N_ENVS))
    assert first["kept"].all()


def test_seeds_are_counted_up_or_listed_or_left_alone(make, parts):
    envs = make(ONE_STEP)
    _, infos = envs.reset(seed=3)
    assert envs.np_random_seed == (3, 4, 5, 6, 7)
    alone = gymnasium.make(ONE_STEP, **parts())
    assert infos["scenario"].tolist() == [alone.reset(seed=seed)[1]["scenario"] for seed in range(3, 8)]
    states = [generator.bit_generator.state for generator in envs.np_random]
    _, infos = envs.reset(seed=[3, None, 3, 9, 4])
    drawn = infos["scenario"]
    assert drawn[0] == drawn[2] and envs.np_random_seed == (3, 4, 3, 9, 4)
    assert envs.envs[1].np_random.bit_generator.state != states[1]
    assert envs.reset()[1]["scenario"][0] != drawn[0]
    with pytest.raises(ValueError, match="expected 5 seeds, one for each environment; got 2"):
        envs.reset(seed=[1, 2])


def test_one_scenario_can_be_given_to_all(make, tiny_llm):
    scenario = Scenario.from_ratio(tiny_llm.shape, Workload(2, 512), 0.75)
    _, infos = make(ONE_STEP).reset(options={"scenario": scenario})
    assert infos["scenario"].tolist() == [scenario] * N_ENVS


def test_action_masks_are_those_of_the_single_environments(make):
    envs = make(SEQUENTIAL)
    envs.reset(seed=0)
    envs.step(np.arange(N_ENVS))
    masks = envs.action_masks()
    assert masks.shape == (N_ENVS, 9) and masks.dtype == bool
    assert_equal(masks, np.stack([env.action_masks() for env in envs.envs]))
    assert not masks[np.arange(N_ENVS), np.arange(N_ENVS)].any(), "what is dropped can't be dropped again"


@pytest.mark.parametrize("name", CLASSES)
def test_every_environment_is_rendered(make, name):
    envs = make(name, num_envs=2, render_mode="ansi")
    envs.reset(seed=0)
    assert envs.render() == tuple(env.render() for env in envs.envs)
    assert all(isinstance(picture, str) for picture in envs.render())
    envs.close()
    assert envs.closed


def test_nothing_given_means_the_embedded_parts_once_for_all(monkeypatch, toy_problem, toy_importance):
    monkeypatch.setattr(rap_env.envs.defaults, "embedded_problem", lambda: toy_problem)
    monkeypatch.setattr(rap_env.envs.defaults, "embedded_defaults", lambda: Defaults(toy_problem, toy_importance))
    envs = gymnasium.make_vec(ONE_STEP, num_envs=3)
    assert all(env.problem is toy_problem and env.importance is toy_importance for env in envs.envs)


@pytest.mark.parametrize("action", [-1, 9, np.int64(-1)])
def test_an_action_that_names_nothing_costs_the_step(make, action):
    envs = make(SEQUENTIAL)
    envs.reset(seed=0)
    actions = np.array([0, 0, action, 8, 8])
    with pytest.raises(InvalidMask, match="expected an action from 0 to 8; got"):
        envs.step(actions)
    assert envs.problem.evaluator.calls == 0
    with pytest.raises(ResetNeeded, match="call reset before the next step"):  # the first two have acted already
        envs.step(np.zeros(N_ENVS, dtype=int))
    observations, _ = envs.reset(seed=0)
    assert observations["kept"].all()
    envs.step(np.zeros(N_ENVS, dtype=int))


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_before_the_first_reset_is_refused(make, name):
    envs = make(name)
    with pytest.raises(ResetNeeded, match="there are no running episodes: call reset before the next step"):
        envs.step(envs.action_space.sample())
    with pytest.raises(InfeasibleBudget):
        envs.reset(options={"scenario": Scenario(Workload(2, 512), 1000)})
    with pytest.raises(ResetNeeded):
        envs.step(envs.action_space.sample())


def test_wrong_numbers_of_environments_and_actions_are_refused(make):
    with pytest.raises(ValueError, match="expected at least 1 environment; got num_envs=0"):
        make(ONE_STEP, num_envs=0)
    envs = make(ONE_STEP)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="expected 5 actions, one for each environment; got 4"):
        envs.step(np.ones((4, 8), dtype=np.int8))
    assert envs.problem.evaluator.calls == 0
    envs.step(np.ones((5, 8), dtype=np.int8))
