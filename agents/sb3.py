"""Stable-Baselines3 algorithms as agents."""

import time
from collections.abc import Mapping
from typing import Any

import gymnasium
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.base import SearchResult, Task
from agents.checkpoint import CheckpointCallback, restore_checkpoint
from agents.imitation import imitate_order
from agents.projection import ProjectToBudget
from agents.relative_reward import RelativeReward
from agents.sb3_policies import (
    ComponentActorCriticPolicy,
    ComponentDQNPolicy,
    ComponentExtractor,
    MaskableComponentActorCriticPolicy,
)
from rap_env.errors import SearchExhausted, UnknownName
from rap_env.policies import OneStepPolicy, SequentialPolicy
from rap_env.rng import seed_everything

_ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], type]] = {
    "ppo": (PPO, ComponentActorCriticPolicy),
    "a2c": (A2C, ComponentActorCriticPolicy),
    "dqn": (DQN, ComponentDQNPolicy),
    "maskable_ppo": (MaskablePPO, MaskableComponentActorCriticPolicy),
}
_ONE_STEP, _SEQUENTIAL = "rap/Pruning-v0", "rap/SequentialPruning-v0"


class _Watch(BaseCallback):
    """Reports progress and each episode's reward terms; stops when the evaluation budget is used up."""

    def __init__(self, task: Task, history: dict[str, list[float]], total_steps: int) -> None:
        super().__init__()
        self._history = history
        self._search_task, self._total_steps = task, total_steps

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                episode = {"reward": float(info["absolute_reward"]), "gain_over_greedy": float(info["episode"]["r"])}
                for name, value in episode.items():
                    self._history.setdefault(name, []).append(value)
                spent = {"evaluations": self._search_task.problem.budget.spent}
                self._search_task.log(self.num_timesteps, episode | spent | info["reward_terms"])
        self._search_task.progress(min(self.num_timesteps, self._total_steps), self._total_steps)
        return not self._search_task.problem.budget.exhausted


class Sb3Agent:
    """Trains one algorithm on one environment, and ends as a network policy for all scenarios of the sampler.

    Args:
        algorithm: `"ppo"`, `"a2c"`, `"dqn"` or `"maskable_ppo"`.
        environment: `"rap/Pruning-v0"` or `"rap/SequentialPruning-v0"`.
        total_steps: Environment steps to train for; PPO and A2C finish the rollout that reaches them.
        warm_start: Whether the network first learns the greedy order by imitation, which costs no evaluation.
        network: Arguments of `ComponentNetwork`: `width`, `blind_to`.
        hyperparameters: Further arguments of the algorithm's constructor.

    Raises:
        UnknownName: No such algorithm or environment.
        ValueError: The algorithm can't act in the environment.
    """

    def __init__(
        self,
        algorithm: str,
        environment: str,
        total_steps: int,
        warm_start: bool = True,
        network: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        if algorithm not in _ALGORITHMS:
            raise UnknownName("algorithm", algorithm, _ALGORITHMS)
        if environment not in (_ONE_STEP, _SEQUENTIAL):
            raise UnknownName("environment", environment, (_ONE_STEP, _SEQUENTIAL))
        if environment == _ONE_STEP and algorithm in ("dqn", "maskable_ppo"):
            raise ValueError(f"{algorithm} acts one component at a time: use environment={_SEQUENTIAL}")
        self._algorithm, self._environment, self._total_steps = algorithm, environment, total_steps
        self._warm_start, self._network = warm_start, dict(network or {})
        self._hyperparameters = dict(hyperparameters or {})

    def search(self, task: Task) -> SearchResult:
        """Trains, going on from the checkpoint in `task.folder` if there is one."""
        started = time.perf_counter()
        model = self._build(task)
        task.folder.mkdir(parents=True, exist_ok=True)
        history: dict[str, list[float]] = {}
        budget = task.problem.budget
        resumed = restore_checkpoint(model, budget, history, task.folder)
        network = model.policy.component_network
        if self._warm_start and not resumed:
            imitate_order(network, task.problem.shape, task.importance.static, task.sampler, task.seed)
        watch = _Watch(task, history, self._total_steps)
        checkpoints = CheckpointCallback(budget, history, task.folder, every_steps=max(1, self._total_steps // 20))
        try:
            remaining = max(0, self._total_steps - model.num_timesteps)
            model.learn(remaining, callback=CallbackList([watch, checkpoints]), reset_num_timesteps=False)
        except SearchExhausted:
            pass  # the last rollout stays unfinished; the policy is what it was before it
        kind = OneStepPolicy if self._environment == _ONE_STEP else SequentialPolicy
        policy = kind(task.problem.shape, network.cpu(), task.importance.static)
        details = {"steps": model.num_timesteps, "resumed": resumed, "episodes": history}
        return SearchResult(policy, budget.spent, time.perf_counter() - started, details)

    def _build(self, task: Task) -> BaseAlgorithm:
        seed_everything(task.seed)
        algorithm, policy = _ALGORITHMS[self._algorithm]
        sequential = self._environment == _SEQUENTIAL
        env = gymnasium.make(self._environment, problem=task.problem, importance=task.importance, sampler=task.sampler)
        if not sequential:
            env = ProjectToBudget(env, task.importance)
        env = Monitor(RelativeReward(env, task.problem, task.importance))
        shape = task.problem.shape
        extractor = {"shape": shape, "sequential": sequential, **self._network}
        policy_arguments = {
            "net_arch": [],
            "features_extractor_class": ComponentExtractor,
            "features_extractor_kwargs": extractor,
        }
        if self._algorithm != "dqn":
            policy_arguments["ortho_init"] = False
        model = algorithm(
            policy,
            DummyVecEnv([lambda: env]),
            seed=task.seed,
            device="cpu",
            policy_kwargs=policy_arguments,
            **self._hyperparameters,
        )
        model.env.envs[0].reset(seed=task.seed)
        return model
