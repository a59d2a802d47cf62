"""Stable-Baselines3 policies whose network is our `ComponentNetwork`, and a DQN that keeps to valid actions."""

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableMultiInputActorCriticPolicy
from stable_baselines3 import DQN
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.dqn.policies import MultiInputPolicy as DQNMultiInputPolicy
from stable_baselines3.dqn.policies import QNetwork
from torch import nn

from rap_env.policies.network import ComponentNetwork


class ComponentExtractor(BaseFeaturesExtractor):
    """Feeds observations to a `ComponentNetwork`; its features are the action scores and the value themselves."""

    def __init__(self, observation_space: spaces.Dict, **network_arguments) -> None:
        network = ComponentNetwork(**network_arguments)
        super().__init__(observation_space, network.n_actions + 1)
        self.network = network

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.network(observations)


class _Slice(nn.Module):
    """Hands on a range of the features."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self._range = slice(start, stop)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., self._range]


class _ComponentHeads:
    """Lets the extractor's outputs stand as logits and value, without further layers."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, net_arch=[], ortho_init=False, **options)

    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        n_actions = self.features_dim - 1
        self.action_net = _Slice(0, n_actions)
        self.value_net = _Slice(n_actions, n_actions + 1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    @property
    def component_network(self) -> ComponentNetwork:
        return self.features_extractor.network


class ComponentActorCriticPolicy(_ComponentHeads, MultiInputActorCriticPolicy):
    """For PPO and A2C."""


class MaskableComponentActorCriticPolicy(_ComponentHeads, MaskableMultiInputActorCriticPolicy):
    """For MaskablePPO."""


class ComponentQNetwork(QNetwork):
    """Action scores plus the state's value (arXiv 1511.06581); minus infinity for actions that are not valid.

    A score sees its own component and the footprint; without the value, which sees all of them, bootstrapping from the
    next state forgets what the components that were dropped on the way there were worth.
    """

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        features = self.extract_features(observation, self.features_extractor)
        kept = observation["kept"].bool()
        done = (observation["footprint"] <= observation["memory_budget"]) | ~kept.any(dim=1, keepdim=True)
        valid = torch.cat([kept & ~done, done], dim=1)  # `valid_actions` of a batch
        return (features[..., :-1] + features[..., -1:]).masked_fill(~valid, -torch.inf)


class ComponentDQNPolicy(DQNMultiInputPolicy):
    """For DQN."""

    def make_q_net(self) -> QNetwork:
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        network = ComponentQNetwork(**arguments | {"net_arch": []}).to(self.device)
        network.q_net = nn.Identity()  # its linear layer; the extractor's outputs are enough
        return network

    @property
    def component_network(self) -> ComponentNetwork:
        return self.q_net.features_extractor.network


class MaskableDQN(DQN):
    """A DQN that explores among the valid actions only, each environment for itself."""

    def _sample_action(self, learning_starts: int, action_noise=None, n_envs: int = 1) -> tuple[np.ndarray, np.ndarray]:
        generator = self.action_space.np_random
        rate = 1.0 if self.num_timesteps < learning_starts else self.exploration_rate
        with torch.no_grad():
            values = self.q_net(self.policy.obs_to_tensor(self._last_obs)[0]).numpy()
        actions = values.argmax(axis=1)
        for index in np.flatnonzero(generator.random(n_envs) < rate):
            actions[index] = generator.choice(np.flatnonzero(np.isfinite(values[index])))
        return actions, actions
