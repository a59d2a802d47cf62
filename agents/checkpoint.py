"""Training checkpoints: everything that the next rollout depends on, in one file that holds tensors and JSON only."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from rap_env.errors import PolicyUnreadable
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.problem import EvaluationBudget
from rap_env.rng import global_states, restore_global_states

_NAME = "checkpoint.pt"
_BUFFER_ARRAYS = ("actions", "rewards", "dones", "timeouts")


def _buffer_arrays(model: OffPolicyAlgorithm) -> dict[str, np.ndarray]:
    buffer = model.replay_buffer
    arrays = {name: getattr(buffer, name) for name in _BUFFER_ARRAYS}
    for name in ("observations", "next_observations"):
        arrays |= {f"{name}.{entry}": values for entry, values in getattr(buffer, name).items()}
    return arrays


def _generators(model) -> tuple[np.random.Generator, np.random.Generator]:
    """Those that draw scenarios and (for DQN) exploratory actions."""
    return model.env.envs[0].unwrapped.np_random, model.action_space.np_random


def save_checkpoint(model, budget: EvaluationBudget, history: dict[str, list[float]], folder: Path) -> None:
    """Writes the state of training between two rollouts, atomically.

    Args:
        model: A Stable-Baselines3 algorithm.
        budget: Evaluations spent so far.
        history: What was logged of each episode so far.
        folder: Where the file goes.
    """
    env = model.env.envs[0].unwrapped
    state = {
        "parameters": model.get_parameters(),
        "counters": {"num_timesteps": model.num_timesteps, "_n_updates": model._n_updates},
        "global_states": global_states(),
        "generators": json.dumps([generator.bit_generator.state for generator in _generators(model)]),
        "scenario": json.dumps(asdict(env.scenario)),
        "asked": sorted(budget.asked),
        "history": history,
    }
    if isinstance(model, OffPolicyAlgorithm):
        state["buffer"] = {name: torch.from_numpy(array) for name, array in _buffer_arrays(model).items()}
        state["counters"] |= {"_n_calls": model._n_calls}
        state["buffer_position"] = [model.replay_buffer.pos, int(model.replay_buffer.full)]
    draft = folder / f".{_NAME}"
    torch.save(state, draft)
    draft.replace(folder / _NAME)


def restore_checkpoint(model, budget: EvaluationBudget, history: dict[str, list[float]], folder: Path) -> bool:
    """Puts a fresh model where a killed one was; an episode that was under way starts anew, with its scenario.

    Returns:
        Whether there was a checkpoint.

    Raises:
        PolicyUnreadable: The file is damaged, or it belongs to a model of other sizes.
    """
    path = folder / _NAME
    if not path.is_file():
        return False
    try:
        state = torch.load(path, weights_only=True)  # tensors and plain values only: nothing is executed
        _restore(model, state)
        budget.asked.update(state["asked"])
        history.update(state["history"])
    except Exception as error:
        advice = f"not a checkpoint of this run ({type(error).__name__}). Move it away to start anew"
        raise PolicyUnreadable(f"{path}: {advice}") from error
    return True


def _restore(model, state: dict) -> None:
    model.set_parameters(state["parameters"], exact_match=True)
    if "buffer" in state:
        for name, array in _buffer_arrays(model).items():
            array[...] = state["buffer"][name].numpy()
        model.replay_buffer.pos, full = state["buffer_position"]
        model.replay_buffer.full = bool(full)
    for name, value in state["counters"].items():
        setattr(model, name, value)
    model.env.reset()  # uses up the seed, which the next reset would start the generator from again
    scenario = json.loads(state["scenario"])
    scenario = Scenario(Workload(**scenario["workload"]), scenario["budget_bytes"])
    model.env.set_options({"scenario": scenario})
    for generator, saved in zip(_generators(model), json.loads(state["generators"]), strict=True):
        generator.bit_generator.state = saved
    restore_global_states(state["global_states"])


class CheckpointCallback(BaseCallback):
    """Saves after every `every_steps` environment steps, at the next point between two rollouts."""

    def __init__(
        self, budget: EvaluationBudget, history: dict[str, list[float]], folder: Path, every_steps: int
    ) -> None:
        super().__init__()
        self._budget, self._history, self._folder, self._every_steps = budget, history, folder, every_steps
        self._saved_at = -1

    def _on_rollout_start(self) -> None:
        if self._saved_at < 0:
            self._saved_at = self.num_timesteps
        if self.num_timesteps - self._saved_at >= self._every_steps:
            save_checkpoint(self.model, self._budget, self._history, self._folder)
            self._saved_at = self.num_timesteps

    def _on_step(self) -> bool:
        return True
