"""FastForward Pruning (arXiv 2511.18977): one-step reinforcement learning of widths, through Stable-Baselines3."""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents.base import Learner, Task
from agents.curriculum import Curriculum, CurriculumProblem, CurriculumSampler
from agents.relabelling import RelabellingBuffer
from agents.vec_env import TrainingVecEnv
from rap_env.envs.vector import WidthVectorEnv
from rap_env.errors import InvalidConfig, SearchExhausted, check_known
from rap_env.memory.projection import Projection
from rap_env.observation import KIND
from rap_env.policies import ArchivePolicy, Policy, WidthPolicy
from rap_env.policies.width import ACTIVATIONS, WidthNetwork, n_width_features, width_features
from rap_env.rng import isolated_rng

# algorithm -> its class, and the layers of its trained policy that compute the mean action, in order
_ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], tuple[str, ...]]] = {
    "ppo": (PPO, ("mlp_extractor.policy_net", "action_net")),
    "sac": (SAC, ("actor.latent_pi", "actor.mu")),
    "td3": (TD3, ("actor.mu",)),
}
_N_ENVS = 15  # episodes of an update, evaluated together
_CURVE_POINTS = 100


class _WidthExtractor(BaseFeaturesExtractor):
    """Feeds the features of a `WidthNetwork` to Stable-Baselines3's own networks."""

    def __init__(self, observation_space: spaces.Dict, blind_to: tuple[str, ...]) -> None:
        n_kinds = observation_space[KIND].shape[0] if KIND in observation_space.spaces else 0
        super().__init__(observation_space, n_width_features(observation_space["site_bytes"].shape[0], n_kinds))
        self._blind_to = blind_to

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        return width_features(observations, self._blind_to)


class _Watch(BaseCallback):
    """Reports progress, and the mean reward of each batch of episodes."""

    def __init__(self, task: Task, problem: CurriculumProblem, total_episodes: int) -> None:
        super().__init__()
        self._search_task, self._problem, self._total_episodes = task, problem, total_episodes

    def _on_step(self) -> bool:
        task, (episodes, reward) = self._search_task, self._problem.rewards[-1]
        task.log(episodes, {"reward": reward, "tokens": task.problem.budget.spent})
        task.progress_of_steps(episodes, self._total_episodes)
        return True


class FastForward(Learner):
    """Learns keep fractions of all sites in episodes of one step, and ends as the network's mean action, projected.

    The projection onto the budget belongs to the environment: the gradient uses the action that was drawn, neither
    projected nor clipped. It needs no importance ranking. Training ends with its episodes or with the token budget,
    whichever is first; what a token budget does not pay for is not learned from.

    Training that was killed is repeated from its seed, and the store answers.

    Args:
        algorithm: `"ppo"`, as in the paper, `"sac"` or `"td3"`. The last two squash actions into the bounds.
        total_episodes: At most so many, in batches of 15.
        projection: Arguments of `Projection`: `kind`, `p_min`, `reading`.
        curriculum: Arguments of `Curriculum`: `episodes`, `sparsity`, `text`.
        network: `layers` and `activation` of policy and value networks, `blind_to` of `WidthNetwork`, for PPO
            `log_std`, where the logarithms of the standard deviations start, and for TD3 `noise`, the standard
            deviation of its exploration.
        hyperparameters: Further arguments of the algorithm's constructor.
        remember: Ends as the best evaluated mask for each budget instead, which is no longer the paper's method.
        relabelled: For SAC and TD3, contexts that each evaluated mask is an example for besides its own, at most; see
            `RelabellingBuffer`.

    Raises:
        UnknownName: No such algorithm, projection, activation or observation entry.
        InvalidConfig: Fewer episodes than a batch has, or a value that projection or curriculum refuse.
    """

    def __init__(  # noqa: PLR0913 - its arguments are the keys of a YAML
        self,
        algorithm: str = "ppo",
        total_episodes: int = 2000,
        projection: Mapping[str, Any] | None = None,
        curriculum: Mapping[str, Any] | None = None,
        network: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        remember: bool = False,
        relabelled: int = 0,
    ) -> None:
        check_known("algorithm", algorithm, _ALGORITHMS)
        if total_episodes < _N_ENVS:
            raise InvalidConfig(f"total_episodes: expected at least {_N_ENVS}, one batch; got {total_episodes}")
        if relabelled and (algorithm == "ppo" or (projection or {}).get("reading") != "affine"):
            raise InvalidConfig(
                "relabelled: expected sac or td3 with projection.reading=affine, as PPO keeps no examples and a"
                f" magnitude has two actions; got {algorithm} with {dict(projection or {})}"
            )
        self._relabelled = relabelled
        self._algorithm, self._total_episodes = algorithm, total_episodes - total_episodes % _N_ENVS
        self._projection, self._curriculum = Projection(**projection or {}), Curriculum(**curriculum or {})
        network = dict(network or {})
        self._log_std, self._noise = network.pop("log_std", 1.0), network.pop("noise", 0.3)
        self._network = {"squashed": algorithm != "ppo", **network}
        with isolated_rng():
            self._form = WidthNetwork(1, **self._network)  # refuses what it does not know
        self._hyperparameters, self._remember = dict(hyperparameters or {}), remember

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._problem = CurriculumProblem(task, self._curriculum)
        first, budget = self._problem.problem(), task.problem.budget
        first.prepare()
        if (needed := _N_ENVS * first.meter.tokens_each + first.evaluator.setup_tokens) > budget.left:
            raise SearchExhausted(
                f"{budget.spent:,} of {budget.limit:,} tokens are spent;"
                f" the first {_N_ENVS} episodes may need {needed:,}"
            )

    def learn(self) -> None:
        task, sampler = self.task, CurriculumSampler(self.task.sampler, self._curriculum)
        with isolated_rng(task.seed):
            model = self._build(sampler)
            try:
                model.learn(self._total_episodes, callback=_Watch(task, self._problem, self._total_episodes))
            except SearchExhausted:
                self.details["exhausted"] = True
            n_sites = len(task.problem.shape.components.sites)
            arguments = self._network | {"kinds": task.sampler.kinds}
            self._trained = mean_network(model, _ALGORITHMS[self._algorithm][1], n_sites, arguments)
        self.details |= {
            "episodes": self._problem.episodes,
            "tokens_of_parts": self._tokens_of_parts(),
            "learning_curve": thinned(self._problem.rewards),
        }

    def policy(self) -> Policy:
        policy = WidthPolicy(self.task.problem.shape, self._trained, self._projection)
        return self._archive_policy(policy) if self._remember else policy

    def _build(self, sampler: CurriculumSampler) -> BaseAlgorithm:
        network, (kind, p_min, reading) = self._form, astuple(self._projection)
        options = {"projection": kind, "p_min": p_min, "reading": reading}
        envs = WidthVectorEnv(_N_ENVS, problem=self._problem, sampler=sampler, **options)
        policy: dict[str, Any] = {
            "features_extractor_class": _WidthExtractor,
            "features_extractor_kwargs": {"blind_to": network.blind_to},
            "net_arch": list(network.layers),
            "activation_fn": ACTIVATIONS[network.activation],
        }
        arguments = dict(self._hyperparameters)
        if self._algorithm == "ppo":
            policy["log_std_init"] = self._log_std
            arguments = {"n_steps": 1, "batch_size": _N_ENVS, **arguments}
        elif self._algorithm == "td3":
            zeros = np.zeros(envs.single_action_space.shape)
            arguments["action_noise"] = NormalActionNoise(zeros, zeros + self._noise)
        if self._relabelled:
            own = {"shape": self._problem.shape, "sampler": self.task.sampler, "copies": self._relabelled}
            arguments |= {
                "replay_buffer_class": RelabellingBuffer,
                "replay_buffer_kwargs": own | {"seed": self.task.seed},
            }
        return _ALGORITHMS[self._algorithm][0](
            "MultiInputPolicy",
            TrainingVecEnv(envs),
            seed=self.task.seed,
            device="cpu",
            policy_kwargs=policy,
            **arguments,
        )

    def _tokens_of_parts(self) -> int:
        """Tokens that were spent on parts of the evaluation data, and not on all of it."""
        budget, owner = self.task.problem.budget, self.task.problem.meter.owner
        before = [0, *(entry.spent_tokens for entry in budget.history)]
        own = (entry.spent_tokens - earlier for entry, earlier in zip(budget.history, before, strict=False))
        return sum(tokens for entry, tokens in zip(budget.history, own, strict=True) if entry.owner != owner)

    def _archive_policy(self, policy: WidthPolicy) -> ArchivePolicy:
        """The best evaluated masks; where none fits, components go in the order in which a nested mask loses them."""
        shape, scenario = self.task.problem.shape, self.task.scenarios[0]
        action = policy.action(scenario.workload, scenario.budget_bytes)
        return ArchivePolicy(shape, self.task.archive.items(), self._projection.dropping_order(shape, action))


def mean_network(
    model: BaseAlgorithm, layers: tuple[str, ...], n_sites: int, arguments: Mapping[str, Any]
) -> WidthNetwork:
    """The network of a trained algorithm's mean action, as a policy of our own holds it.

    Args:
        model: The trained algorithm.
        layers: Where its policy has the linear layers.
        n_sites: S.
        arguments: Those of `WidthNetwork`.
    """
    network = WidthNetwork(n_sites, **arguments)
    modules = [module for name in layers for module in model.policy.get_submodule(name).modules()]
    trained = [module for module in modules if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for own, linear in zip(network.linears, trained, strict=True):
            own.weight.copy_(linear.weight)
            own.bias.copy_(linear.bias)
    return network


def thinned(rewards: list[list[float]]) -> list[list[float]]:
    """A learning curve in at most 100 parts of the training, as [episodes, mean reward]."""
    parts = np.array_split(np.array(rewards), min(_CURVE_POINTS, len(rewards)) or 1)
    return [[int(part[-1, 0]), float(part[:, 1].mean())] for part in parts if len(part)]
