"""Stable-Baselines3 algorithms that learn to prune candidates in `rap/Selection-v0`."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rap_env.envs.selection import SelectionEnv
from rap_env.errors import check_known
from rap_env.rerank.cuts import CUTS, GO_ON
from rap_env.rng import isolated_rng

_N_ENVS = 8
_N_CHECKS = 8
_GO_ON_LOGIT = 4.0  # at first 4 of 5 decisions go on; with equal chances few requests would see their later layers
_GAMMA = 1.0  # an episode has as many decisions as layers at most, and all that counts comes at its end

# By name: the algorithm, and what differs from its defaults.
_ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], Mapping[str, Any]]] = {
    "ppo": (PPO, {"n_steps": 256, "batch_size": 512, "learning_rate": 1e-3, "ent_coef": 0.003}),
    "dqn": (
        DQN,
        {
            "learning_starts": 5_000,
            "buffer_size": 100_000,
            "batch_size": 128,
            "train_freq": 2,
            "gradient_steps": 2,
            "target_update_interval": 2_000,
            "exploration_fraction": 0.4,
        },
    ),
}
ALGORITHMS = tuple(_ALGORITHMS)


class _OverReadingAll(gymnasium.Wrapper):
    """Rewards minus what reading everything earns: what differs between decisions is small beside the sum."""

    def step(self, action):
        seen, reward, terminated, truncated, info = self.env.step(action)
        return seen, reward - terminated * sum(self.env.reward_weights.values()), terminated, truncated, info


class Learned:
    """A trained network that chooses the cut it likes best; `Choosing` makes a decider of it.

    Attributes:
        model: What was trained.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self.model = model

    def choose(self, observation: np.ndarray) -> int:
        return int(self.model.predict(observation, deterministic=True)[0])


class _Checks(BaseCallback):
    """Reports progress, and keeps the parameters that validate best."""

    def __init__(self, every: int, validate: Callable[[Learned], float], report: Callable[[int], None]) -> None:
        super().__init__()
        self._every, self._validate, self._report = every, validate, report
        self._best: tuple[float, Mapping[str, Any]] | None = None
        self._next = every

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self._next:  # before a rollout, since nothing is learned inside of one
            self._next = self.num_timesteps + self._every
            self._check()

    def _on_step(self) -> bool:
        self._report(self.num_timesteps)
        return True

    def _on_training_end(self) -> None:
        self._check()
        self.model.policy.load_state_dict(self._best[1])

    def _check(self) -> None:
        value = self._validate(Learned(self.model))
        if self._best is None or value > self._best[0]:
            self._best = value, copy.deepcopy(self.model.policy.state_dict())


def learn(
    algorithm: str,
    make_env: Callable[[], SelectionEnv],
    total_steps: int,
    seed: int,
    validate: Callable[[Learned], float],
    progress: Callable[[int], None] = lambda n_steps: None,
) -> Learned:
    """Trains in 8 environments at once; rewards are scaled by their running deviation.

    Args:
        algorithm: `"ppo"` or `"dqn"`.
        make_env: Makes an environment, which draws its requests itself.
        total_steps: Environment steps to train for; PPO finishes the rollout that reaches them.
        seed: Of requests, weights and exploration.
        validate: Says how good a network is, higher is better; of those after each eighth of the steps, the best one
            is returned. On other queries than those that are trained on.
        progress: Is told how many steps were taken.

    Raises:
        UnknownName: There is no such algorithm.
    """
    kind, settings = _ALGORITHMS[check_known("algorithm", algorithm, ALGORITHMS)]
    with isolated_rng(seed):
        envs = DummyVecEnv([lambda: _OverReadingAll(make_env())] * _N_ENVS)
        # Without a clip: a miss may cost far more than the usual deviation, and has to.
        envs = VecNormalize(envs, norm_obs=False, gamma=_GAMMA, clip_reward=np.inf)
        model = kind("MlpPolicy", envs, seed=seed, device="cpu", gamma=_GAMMA, **settings)
        if isinstance(model, PPO):
            with torch.no_grad():
                model.policy.action_net.bias[CUTS.index(GO_ON)] = _GO_ON_LOGIT
        model.learn(total_steps, callback=_Checks(max(1, total_steps // _N_CHECKS), validate, progress))
    return Learned(model)
