"""Stable-Baselines3 algorithms as agents."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.base import Learner, Task
from agents.imitation import imitate_order
from agents.sb3_policies import (
    ComponentActorCriticPolicy,
    ComponentDQNPolicy,
    ComponentExtractor,
    MaskableComponentActorCriticPolicy,
    MaskableDQN,
)
from agents.training_problem import TrainingProblem
from agents.vec_env import TrainingVecEnv
from rap_env.envs.vector import PruningVectorEnv, SequentialPruningVectorEnv
from rap_env.errors import SearchExhausted, check_known
from rap_env.mask import PruningMask
from rap_env.policies import OneStepPolicy, SequentialPolicy
from rap_env.rng import isolated_rng

_ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], type]] = {
    "ppo": (PPO, ComponentActorCriticPolicy),
    "a2c": (A2C, ComponentActorCriticPolicy),
    "dqn": (MaskableDQN, ComponentDQNPolicy),
    "maskable_ppo": (MaskablePPO, MaskableComponentActorCriticPolicy),
}
_ONE_STEP, _SEQUENTIAL = "rap/Pruning-v0", "rap/SequentialPruning-v0"
_ENVIRONMENTS = {
    _ONE_STEP: (PruningVectorEnv, OneStepPolicy),
    _SEQUENTIAL: (SequentialPruningVectorEnv, SequentialPolicy),
}
_N_ENVS = 16
_CURVE_POINTS = 100


class _Watch(BaseCallback):
    """Reports progress, and means over the episodes that end in a step."""

    def __init__(self, task: Task, total_steps: int) -> None:
        super().__init__()
        self._search_task, self._total_steps = task, total_steps
        self._gains: list[tuple[int, float]] = []

    def curve(self) -> list[list[float]]:
        """The reward minus the greedy order's in 100 parts of the training, as [steps, mean]."""
        parts = np.array_split(np.array(self._gains), min(_CURVE_POINTS, len(self._gains)) or 1)
        return [[int(part[-1, 0]), float(part[:, 1].mean())] for part in parts if len(part)]

    def _on_step(self) -> bool:
        task = self._search_task
        outcomes = [info["outcome"] for info in self.locals["infos"] if "outcome" in info]
        if outcomes:
            rewards = [task.problem.reward(outcome) for outcome in outcomes]
            columns = {
                "reward": rewards,
                "gain_over_greedy": [r - o.greedy_reward for r, o in zip(rewards, outcomes, strict=True)],
                "evaluated": [outcome.evaluated for outcome in outcomes],
            }
            means = {name: sum(column) / len(column) for name, column in columns.items()}
            self._gains.append((self.num_timesteps, means["gain_over_greedy"]))
            task.log(self.num_timesteps, means | {"tokens": task.problem.budget.spent})
        task.progress_of_steps(min(self.num_timesteps, self._total_steps), self._total_steps)
        return True


class Sb3Agent(Learner):
    """Trains one algorithm in 16 environments at once, and ends as a network policy for all scenarios of the sampler.

    Training that was killed is repeated from its seed: the store answers, so that nothing is measured twice and the
    weights are exactly the same.

    Args:
        algorithm: `"ppo"`, `"a2c"`, `"dqn"` or `"maskable_ppo"`.
        environment: `"rap/Pruning-v0"` or `"rap/SequentialPruning-v0"`.
        total_steps: Environment steps to train for, whether or not the token budget still pays for them (see
            `TrainingProblem`); PPO and A2C finish the rollout that reaches them.
        warm_start: Whether the network first learns the greedy order by imitation, which costs no evaluation.
        network: Arguments of `ComponentNetwork`: `width`, `blind_to`.
        hyperparameters: Further arguments of the algorithm's constructor.

    Raises:
        UnknownName: No such algorithm or environment.
        ValueError: The algorithm can't act in the environment, or can't start from imitated preferences.
    """

    def __init__(
        self,
        algorithm: str,
        environment: str,
        total_steps: int,
        warm_start: bool = False,
        network: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        check_known("algorithm", algorithm, _ALGORITHMS)
        check_known("environment", environment, _ENVIRONMENTS)
        if environment == _ONE_STEP and algorithm in ("dqn", "maskable_ppo"):
            raise ValueError(f"{algorithm} acts one component at a time: use environment={_SEQUENTIAL}")
        if algorithm == "dqn" and warm_start:
            raise ValueError("dqn learns rewards, and imitation gives it preferences: use warm_start=false")
        self._envs, self._policy = _ENVIRONMENTS[environment]
        self._algorithm, self._total_steps, self._warm_start = algorithm, total_steps, warm_start
        self._network, self._hyperparameters = dict(network or {}), dict(hyperparameters or {})

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._order = task.importance.static  # pays for the ranking
        if not task.problem.meter.affordable([PruningMask.all_kept(task.problem.shape)]):
            raise SearchExhausted(f"{task.problem.budget.spent:,} tokens are spent; none is left to evaluate a mask")

    def learn(self) -> None:
        task, problem = self.task, TrainingProblem(self.task, project=self._policy is OneStepPolicy)
        with isolated_rng(task.seed):
            model = self._build(problem)
            self._trained = model.policy.component_network
            if self._warm_start:
                imitate_order(self._trained, problem.shape, self._order, task.sampler, task.seed)
            watch = _Watch(task, self._total_steps)
            model.learn(self._total_steps, callback=watch)
        self.details |= {
            "steps": model.num_timesteps,
            "evaluated_steps": problem.evaluated_steps,
            "approximated_steps": problem.approximated_steps,
            "learning_curve": watch.curve(),
        }

    def policy(self) -> OneStepPolicy | SequentialPolicy:
        return self._policy(self.task.problem.shape, self._trained, self._order)

    def _build(self, problem: TrainingProblem) -> BaseAlgorithm:
        algorithm, network_policy = _ALGORITHMS[self._algorithm]
        envs = self._envs(_N_ENVS, problem=problem, importance=self.task.importance, sampler=self.task.sampler)
        network = {"shape": problem.shape, "sequential": self._policy.sequential, **self._network}
        return algorithm(
            network_policy,
            TrainingVecEnv(envs),
            seed=self.task.seed,
            device="cpu",
            policy_kwargs={"features_extractor_class": ComponentExtractor, "features_extractor_kwargs": network},
            **self._hyperparameters,
        )
