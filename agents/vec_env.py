"""A pruning vector environment as Stable-Baselines3 trains in it."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from rap_env.envs.sequential import SequentialPruningEnv
from rap_env.envs.vector import PruningVectorEnv
from rap_env.mask import PruningMask
from rap_env.policies.walk import fit_to_budget


class TrainingVecEnv(VecEnv):
    """Translates between two interfaces, so that the masks of all environments are evaluated together.

    One-step actions are projected onto the masks that fit, as `OneStepPolicy` does when it serves; the gradient belongs
    to the agent's own bits, as in FastForward (arXiv 2511.18977). Without the projection half of a training goes into
    hitting the budget, which arithmetic does better.

    Args:
        envs: What is trained in.
        order: All component names, the first to go first, for the projection.
    """

    def __init__(self, envs: PruningVectorEnv, order: tuple[str, ...]) -> None:
        self.envs, self._order = envs, order
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def seed(self, seed: int | None = None) -> list[int]:
        """Gives each environment a seed of its own at the next reset; other seeds share none of them."""
        self._seeds = np.random.SeedSequence(seed).generate_state(self.num_envs).tolist()
        return self._seeds

    def reset(self) -> dict[str, np.ndarray]:
        observations, _infos = self.envs.reset(seed=self._seeds)
        self._reset_seeds()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        is_sequential = issubclass(self.envs.single_class, SequentialPruningEnv)
        self._actions = actions if is_sequential else self._project(actions)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, rewards [N], ends of episodes [N], and infos: `outcome` where an episode ended."""
        observations, rewards, terminated, truncated, gathered = self.envs.step(self._actions)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(cut)} for cut in truncated]
        ended = terminated | truncated
        for index in np.flatnonzero(ended):
            infos[index]["terminal_observation"] = gathered["final_obs"][index]
            infos[index]["outcome"] = gathered["final_info"]["outcome"][index]
        return observations, rewards.astype(np.float32), ended, infos

    def _project(self, actions: np.ndarray) -> np.ndarray:
        shape, projected = self.envs.problem.shape, []
        for env, bits in zip(self.envs.envs, actions, strict=True):
            wish, scenario = PruningMask.from_bits(shape, bits), env.scenario
            projected.append(fit_to_budget(wish, shape, self._order, scenario.workload, scenario.budget_bytes).keep)
        return np.array(projected, dtype=np.int8)

    def _chosen(self, indices: None | int | Iterable[int]) -> list:
        return [self.envs.envs[index] for index in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: None | int | Iterable[int] = None) -> list[Any]:
        return [getattr(env, attr_name) for env in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: None | int | Iterable[int] = None) -> None:
        for env in self._chosen(indices):
            setattr(env, attr_name, value)

    def env_method(self, method_name: str, *arguments, indices: None | int | Iterable[int] = None, **options) -> list:
        """What a method of each environment returns; MaskablePPO asks for `action_masks`."""
        return [getattr(env, method_name)(*arguments, **options) for env in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: None | int | Iterable[int] = None) -> list[bool]:
        return [False for _env in self._chosen(indices)]

    def close(self) -> None:
        self.envs.close()
