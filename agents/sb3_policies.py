"""Stable-Baselines3 policies whose network is our `ComponentNetwork`."""

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableMultiInputActorCriticPolicy
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


class _Duel(nn.Module):
    """Action values from scores and the state's value: a state is worth less for what was dropped on the way to it.

    A score sees its own component and the footprint, so without the value (arXiv 1511.06581, whose advantages are
    centred; here scores need not be) one-step bootstrapping would forget the cost of earlier drops.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., :-1] + features[..., -1:]


class _ComponentHeads:
    """Lets the extractor's outputs stand as logits and value, without further layers."""

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
    """Q-values are the network's action scores.

    The greedy action is taken among the valid ones, and so is the best next value: dropping what is dropped changes
    nothing, and a maximum over such actions too would only add their errors.

    Attributes:
        only_valid: Whether the values of actions that make no sense are minus infinity.
    """

    only_valid = False

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        values = super().forward(observation)
        return values.masked_fill(~_valid_actions(observation), -torch.inf) if self.only_valid else values

    def _predict(self, observation: dict[str, torch.Tensor], deterministic: bool = True) -> torch.Tensor:
        values = super().forward(observation)
        return values.masked_fill(~_valid_actions(observation), -torch.inf).argmax(dim=1)


def _valid_actions(observation: dict[str, torch.Tensor]) -> torch.Tensor:
    """`rap_env.envs.observation.valid_actions` of a batch, [B, n + 1]."""
    kept = observation["kept"].bool()
    done = (observation["footprint"] <= observation["memory_budget"]) | ~kept.any(dim=1, keepdim=True)
    return torch.cat([kept & ~done, done], dim=1)


class ComponentDQNPolicy(DQNMultiInputPolicy):
    """For DQN."""

    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        self.q_net_target.only_valid = True

    def make_q_net(self) -> QNetwork:
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        network = ComponentQNetwork(**arguments).to(self.device)
        network.q_net = _Duel()
        return network

    @property
    def component_network(self) -> ComponentNetwork:
        return self.q_net.features_extractor.network
