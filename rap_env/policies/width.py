"""The policy that chooses widths: a network's mean action, projected onto the masks that fit."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from rap_env.errors import check_known
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.projection import Projection
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.observation import KIND, observe_widths
from rap_env.policies.base import Policy, policy_kind
from rap_env.policies.network import with_weights

# Entries of the observation that the network reads; the others are the same at every decision.
WIDTH_ENTRIES = ("memory_budget", "batch_size", "sequence_length", "site_bytes")
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def n_width_features(n_sites: int, n_kinds: int = 0) -> int:
    """Features of `width_features` for S sites and K kinds of text."""
    return 3 + n_sites + n_kinds


def width_features(observation: Mapping[str, torch.Tensor], blind_to: Sequence[str] = ()) -> torch.Tensor:
    """What the network sees of observations of B environments, S sites each and K kinds of text: [B, 3 + S + K].

    Bytes of sites are relative to an equal share of the dense footprint, so that features are about 1 for any S.

    Args:
        observation: Entries [B, size] of `rap/Width-v0`.
        blind_to: Entries that are zeros for it.
    """
    entries = {name: observation[name].float() for name in (*WIDTH_ENTRIES, KIND) if name in observation}
    entries["site_bytes"] = entries["site_bytes"] * entries["site_bytes"].shape[-1]
    seen = [torch.zeros_like(entry) if name in blind_to else entry for name, entry in entries.items()]
    return torch.cat(seen, dim=-1)


class WidthNetwork(nn.Module):
    """A plain MLP from the features of an observation to a number for each site.

    Args:
        n_sites: S.
        layers: Units of each hidden layer.
        activation: `"tanh"` or `"relu"`.
        squashed: Whether a tanh ends it, as in SAC and TD3.
        blind_to: Entries of the observation that it sees zeros for. One that is blind to all of them has the same
            action for every scenario; with a nested projection its masks are subsets of one another.
        kinds: Kinds of text that workloads may be of.

    Raises:
        UnknownName: No such activation, or no such entry.
    """

    def __init__(
        self,
        n_sites: int,
        layers: Sequence[int] = (256, 256, 128),
        activation: str = "tanh",
        squashed: bool = False,
        blind_to: Sequence[str] = (),
        kinds: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_known("activation", activation, ACTIVATIONS)
        for name in blind_to:
            check_known("observation entry", name, (*WIDTH_ENTRIES, KIND))
        self.layers, self.activation = tuple(layers), activation
        self.squashed, self.blind_to, self.kinds = squashed, tuple(blind_to), tuple(kinds)
        sizes = [n_width_features(n_sites, len(self.kinds)), *self.layers, n_sites]
        self.linears = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self._between = ACTIVATIONS[activation]()

    def forward(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Observation entries [B, size] -> mean actions [B, S]."""
        hidden = width_features(observation, self.blind_to)
        for linear in self.linears[:-1]:
            hidden = self._between(linear(hidden))
        mean = self.linears[-1](hidden)
        return mean.tanh() if self.squashed else mean

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments but for the number of sites, as JSON holds them."""
        return {
            "layers": list(self.layers),
            "activation": self.activation,
            "squashed": self.squashed,
            "blind_to": list(self.blind_to),
            "kinds": list(self.kinds),
        }


@policy_kind
class WidthPolicy(Policy):
    """Decides by the mean of a Gaussian policy over actions of `rap/Width-v0`, projected as in its training."""

    kind = "width"

    def __init__(self, shape: ModelShape, network: WidthNetwork, projection: Projection) -> None:
        self.shape = shape
        self._network, self._projection = network.eval(), projection

    @torch.inference_mode()
    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        return self._projection.mask(self.shape, self.action(workload, budget_bytes), workload, budget_bytes)

    @torch.inference_mode()
    def action(self, workload: Workload, budget_bytes: int) -> np.ndarray:
        """The mean action [S]."""
        scenario, dense = Scenario(workload, budget_bytes), PruningMask.all_kept(self.shape)
        seen = observe_widths(self.shape, scenario, dense, self._network.kinds)
        return self._network({name: torch.from_numpy(entry)[None] for name, entry in seen.items()})[0].numpy()

    def fractions(self, workload: Workload, budget_bytes: int) -> list[float]:
        """The keep fractions [S] that it asks for, before they are made to fit."""
        return self._projection.fractions(self.action(workload, budget_bytes), len(self.shape.components.sites))

    def parameters(self) -> dict[str, Any]:
        return {"network": self._network.arguments(), "projection": vars(self._projection).copy()}

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._network.state_dict()

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping[str, torch.Tensor]) -> "WidthPolicy":
        n_sites, arguments = len(shape.components.sites), parameters["network"]
        network = with_weights(lambda: WidthNetwork(n_sites, **arguments), tensors)
        return cls(shape, network, Projection(**parameters["projection"]))
