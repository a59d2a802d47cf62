"""A training that is killed goes on from its checkpoint; a checkpoint that is no checkpoint is refused and kept."""

import os
import pickle
from dataclasses import replace

import pytest
import torch

from agents.base import Task
from agents.sb3 import Sb3Agent
from rap_env.errors import PolicyUnreadable
from rap_env.problem import EvaluationBudget, PruningProblem
from tests.conftest import TOY_WINDOWS

ONE_STEP, SEQUENTIAL = "rap/Pruning-v0", "rap/SequentialPruning-v0"
SETTINGS = {
    "ppo": (ONE_STEP, {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "learning_rate": 1e-2}),
    "a2c": (ONE_STEP, {"n_steps": 8, "learning_rate": 1e-2}),
    "dqn": (SEQUENTIAL, {"buffer_size": 300, "learning_starts": 20, "batch_size": 16, "learning_rate": 1e-2}),
    "maskable_ppo": (SEQUENTIAL, {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "learning_rate": 1e-2}),
}
STEPS, KILLED_AT = 160, 100


class Killed(BaseException):
    """Not an `Exception`, as a kill can't be caught by accident."""


def kill(done: int, total: int) -> None:
    if done == KILLED_AT:
        raise Killed


@pytest.fixture
def task(tiny_llm, toy_problem, toy_importance, toy_sampler, tmp_path) -> Task:
    problem = PruningProblem(tiny_llm, toy_problem.evaluator, budget=EvaluationBudget(1000))
    return Task(problem, toy_importance, toy_sampler, [], TOY_WINDOWS, seed=3, folder=tmp_path / "training")


def anew(task: Task, **changes) -> Task:
    """The task as a new process would build it."""
    problem = PruningProblem(task.problem.llm, task.problem.evaluator, budget=EvaluationBudget(1000))
    return replace(task, problem=problem, **changes)


def agent(algorithm: str, warm_start: bool = True) -> Sb3Agent:
    environment, hyperparameters = SETTINGS[algorithm]
    return Sb3Agent(algorithm, environment, STEPS, warm_start, {"width": 16}, hyperparameters=hyperparameters)


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_killed_training_ends_with_the_same_weights_as_an_uninterrupted_one(algorithm, task, tmp_path):
    logged = {"resumed": [], "whole": []}
    with pytest.raises(Killed):
        agent(algorithm).search(replace(task, progress=kill))
    resumed = agent(algorithm).search(anew(task, log=lambda *line: logged["resumed"].append(line)))
    uninterrupted = anew(task, folder=tmp_path / "whole", log=lambda *line: logged["whole"].append(line))
    whole = agent(algorithm).search(uninterrupted)
    assert resumed.details["resumed"] and not whole.details["resumed"]
    assert resumed.details["steps"] == whole.details["steps"] == STEPS
    assert resumed.evaluations == whole.evaluations
    assert logged["resumed"] == logged["whole"][-len(logged["resumed"]) :], "the same episodes, to the bit"
    weights, expected = resumed.policy.tensors(), whole.policy.tensors()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize("algorithm", ["dqn", "maskable_ppo"])
def test_killed_sequential_training_goes_on_with_its_counters(algorithm, task):
    seen = []
    with pytest.raises(Killed):
        agent(algorithm).search(replace(task, progress=kill))
    state = torch.load(task.folder / "checkpoint.pt", weights_only=True)
    steps_kept = state["counters"]["num_timesteps"]
    assert KILLED_AT - 16 <= steps_kept < KILLED_AT
    again = anew(task, progress=lambda done, total: seen.append(done))
    resumed = agent(algorithm).search(again)
    assert seen[0] == steps_kept + 1 and seen[-1] == resumed.details["steps"] == STEPS
    assert set(state["asked"]) <= again.problem.budget.asked
    assert resumed.evaluations == len(again.problem.budget.asked)


def test_replay_buffer_is_put_back_whole(task):
    with pytest.raises(Killed):
        agent("dqn").search(replace(task, progress=kill))
    state = torch.load(task.folder / "checkpoint.pt", weights_only=True)
    steps = state["counters"]["num_timesteps"]
    assert state["buffer_position"] == [steps, 0]
    agent("dqn").search(anew(task, progress=lambda done, total: None))
    after = torch.load(task.folder / "checkpoint.pt", weights_only=True)
    assert after["buffer_position"][0] > steps
    for name, entries in state["buffer"].items():
        assert torch.equal(after["buffer"][name][:steps], entries[:steps]), name


def test_resumed_search_draws_other_scenarios_than_the_beginning(task):
    """The stream of scenarios goes on; drawing the first ones again would train on them twice."""
    drawn = []

    class Recording(type(task.sampler)):
        def sample(self, shape, generator):
            drawn.append(super().sample(shape, generator))
            return drawn[-1]

    recorded = replace(task, sampler=Recording())
    with pytest.raises(Killed):
        agent("ppo", warm_start=False).search(replace(recorded, progress=kill))
    before = set(drawn)
    drawn.clear()
    agent("ppo", warm_start=False).search(anew(recorded))
    repeated = [scenario for scenario in drawn if scenario in before]
    # what the killed run had drawn after its checkpoint, and the first reset of a new environment
    assert len(repeated) <= 16 + 2 < len(drawn)


def test_finished_training_is_not_trained_further(task):
    first = agent("ppo").search(task)
    progress = []
    again = anew(task, progress=lambda done, total: progress.append(done))
    state = torch.load(task.folder / "checkpoint.pt", weights_only=True)
    second = agent("ppo").search(again)
    assert second.details["steps"] == first.details["steps"]
    assert len(progress) == STEPS - state["counters"]["num_timesteps"]


def test_warm_start_is_not_repeated_on_resuming(task, monkeypatch):
    with pytest.raises(Killed):
        agent("ppo").search(replace(task, progress=kill))
    monkeypatch.setattr("agents.sb3.imitate_order", lambda *_: pytest.fail("imitated again"))
    agent("ppo").search(anew(task))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other sizes"])
def test_damaged_checkpoint_is_refused_and_left_as_it_is(damage, task):
    with pytest.raises(Killed):
        agent("ppo").search(replace(task, progress=kill))
    path = task.folder / "checkpoint.pt"
    whole = path.read_bytes()
    width = 16
    if damage == "other sizes":
        width = 24
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"not a checkpoint", "empty": b""}[damage])
    before = path.read_bytes()
    environment, hyperparameters = SETTINGS["ppo"]
    with pytest.raises(PolicyUnreadable, match=r"checkpoint\.pt: not a checkpoint of this run.*Move it away"):
        Sb3Agent("ppo", environment, STEPS, True, {"width": width}, hyperparameters).search(anew(task))
    assert path.read_bytes() == before


class _Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["RAP_TEST_EVIL"],)


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_checkpoint_is_not_executed(save, task, tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_TEST_EVIL", str(tmp_path / "executed"))
    task.folder.mkdir()
    path = task.folder / "checkpoint.pt"
    save({"parameters": _Evil()}, path)
    before = path.read_bytes()
    with pytest.raises(PolicyUnreadable, match="not a checkpoint of this run"):
        agent("ppo").search(task)
    assert not (tmp_path / "executed").exists()
    assert path.read_bytes() == before
