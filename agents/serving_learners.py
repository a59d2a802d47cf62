"""Stable-Baselines3 algorithms that learn to choose levels in `rap/Serving-v0`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rap_env.envs.serving import ServingEnv
from rap_env.errors import check_known
from rap_env.rng import isolated_rng

_N_ENVS = 8
_GAMMA = 0.99  # 25 seconds of decisions each quarter of a second; requests end within some seconds

# By name: the algorithm, its policy, and what differs from its defaults.
_ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], str, Mapping[str, Any]]] = {
    "ppo": (PPO, "MlpPolicy", {"n_steps": 256, "batch_size": 512, "learning_rate": 1e-3}),
    "recurrent_ppo": (
        RecurrentPPO,
        "MlpLstmPolicy",
        {
            "n_steps": 128,
            "batch_size": 256,
            "n_epochs": 4,
            "learning_rate": 1e-3,
            "policy_kwargs": {"lstm_hidden_size": 32, "net_arch": [32]},
        },
    ),
    "dqn": (
        DQN,
        "MlpPolicy",
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


class Learned:
    """A trained network that chooses the level it likes best.

    Args:
        model: What was trained.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self._model, self._memory = model, None

    def begin(self, env: ServingEnv) -> None:
        self._memory = None

    def choose(self, env: ServingEnv, observation: np.ndarray) -> int:
        first = np.array([self._memory is None])
        level, self._memory = self._model.predict(observation, self._memory, first, deterministic=True)
        return int(level)


class _Progress(BaseCallback):
    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report

    def _on_step(self) -> bool:
        self._report(self.num_timesteps)
        return True


def learn(
    algorithm: str,
    make_env: Callable[[], ServingEnv],
    total_steps: int,
    seed: int,
    progress: Callable[[int], None] = lambda n_steps: None,
) -> Learned:
    """Trains in 8 environments at once; rewards are scaled by their running deviation.

    Args:
        algorithm: `"ppo"`, `"recurrent_ppo"` or `"dqn"`.
        make_env: Makes an environment, which draws its episodes itself.
        total_steps: Environment steps to train for; the algorithms on policy finish the rollout that reaches them.
        seed: Of episodes, weights and exploration.
        progress: Is told how many steps were taken.

    Raises:
        UnknownName: There is no such algorithm.
    """
    kind, policy, settings = _ALGORITHMS[check_known("algorithm", algorithm, ALGORITHMS)]
    with isolated_rng(seed):
        envs = VecNormalize(DummyVecEnv([make_env] * _N_ENVS), norm_obs=False, gamma=_GAMMA)
        model = kind(policy, envs, seed=seed, device="cpu", gamma=_GAMMA, **settings)
        model.learn(total_steps, callback=_Progress(progress))
    return Learned(model)
