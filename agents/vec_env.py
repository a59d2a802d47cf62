"""A pruning vector environment as Stable-Baselines3 trains in it."""

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from rap_env.envs.vector import PruningVectorEnv


class TrainingVecEnv(DummyVecEnv):
    """Stable-Baselines3's own vector environment, but stepped by ours, which evaluates all masks together.

    Args:
        together: Steps and resets the environments.
    """

    def __init__(self, together: PruningVectorEnv) -> None:
        super().__init__([lambda env=env: env for env in together.envs])
        self._together = together

    def seed(self, seed: int | None = None) -> list[int]:
        """Gives each environment a seed for the next reset; neighbouring seeds share none, as counting up would."""
        self._seeds = np.random.SeedSequence(seed).generate_state(self.num_envs).tolist()
        return self._seeds

    def reset(self) -> dict[str, np.ndarray]:
        observations, _infos = self._together.reset(seed=self._seeds)
        self._reset_seeds()
        return observations

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, rewards [N], ends of episodes [N], and infos: `outcome` where an episode ended."""
        observations, rewards, terminated, truncated, gathered = self._together.step(self.actions)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(cut)} for cut in truncated]
        ended = terminated | truncated
        for index in np.flatnonzero(ended):
            infos[index]["terminal_observation"] = gathered["final_obs"][index]
            infos[index]["outcome"] = gathered["final_info"]["outcome"][index]
        return observations, rewards.astype(np.float32), ended, infos
