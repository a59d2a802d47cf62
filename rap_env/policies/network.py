"""The policy network: one small function shared by all components."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from rap_env.errors import check_known
from rap_env.llm.shape import ModelShape

# Entries of an observation that the network reads.
ENTRIES = ("memory_budget", "batch_size", "sequence_length", "footprint", "gsi_ranking", "component_bytes", "kept")
_SCENARIO_FEATURES = 5  # budget, batch, length, footprint, excess
_COMPONENT_FEATURES = 5  # rank, bytes, kept, share of the KV cache, depth
_Network = TypeVar("_Network", bound=nn.Module)


class ComponentNetwork(nn.Module):
    """Scores every component by the same MLP, from its own features and the scenario's.

    What is learned about "an unimportant component that frees many bytes" holds for all of them at once, so a few
    hundred evaluated masks are enough to learn from; a table of biases, linear in the scenario, learns what is
    particular to one component.

    Shapes: B observations, n components.

    Args:
        shape: The model whose components are scored.
        sequential: Adds a score for the stop action.
        width: Hidden units of the shared MLP.
        blind_to: Entries of the observation that it sees zeros for, to learn what they are worth.

    Raises:
        UnknownName: The observation has no such entry.
    """

    def __init__(self, shape: ModelShape, sequential: bool, width: int = 64, blind_to: Sequence[str] = ()) -> None:
        super().__init__()
        for name in blind_to:
            check_known("observation entry", name, ENTRIES)
        n = len(shape.components)
        self.sequential, self.width, self.blind_to = sequential, width, tuple(blind_to)
        self.n_actions = n + sequential
        self.body = nn.Sequential(
            nn.Linear(_SCENARIO_FEATURES + _COMPONENT_FEATURES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.score = nn.Linear(width, 1)
        self.particular = nn.Linear(_SCENARIO_FEATURES, n)
        self.value = nn.Linear(width, 1)
        self.stop = nn.Linear(width, 1) if sequential else None
        for layer in (self.score, self.particular, self.value):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        most_kv_bytes = max(c.kv_bytes_per_token for c in shape.components) or 1
        static = [[c.kv_bytes_per_token / most_kv_bytes, c.site.layer / shape.n_layers] for c in shape.components]
        self.register_buffer("static", torch.tensor(static), persistent=False)

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """Observation entries [B, size] -> [B, n_actions + 1]: action scores, then the state's value.

        A score is the logit of keeping a component in the one-step form, and of dropping it (or of stopping) in the
        sequential form.
        """
        observation = observation | {name: torch.zeros_like(observation[name]) for name in self.blind_to}
        budget, footprint = observation["memory_budget"], observation["footprint"]
        excess = 10.0 * (footprint - budget).clamp(-0.1, 0.1)
        sizes = observation["batch_size"], observation["sequence_length"]
        scenario = torch.cat([budget, *sizes, footprint, excess], dim=-1)
        ranking, freed, kept = (observation[name] for name in ("gsi_ranking", "component_bytes", "kept"))
        batch, n = ranking.shape
        components = torch.stack([2.0 * ranking - 1.0, n * freed, kept.float()], dim=-1)
        of_all = self.static.expand(batch, n, 2), scenario[:, None].expand(batch, n, _SCENARIO_FEATURES)
        hidden = self.body(torch.cat([components, *of_all], dim=-1))
        scores = self.score(hidden)[..., 0] + self.particular(scenario)
        pooled = hidden.mean(dim=1)
        outputs = [scores, self.stop(pooled)] if self.stop is not None else [scores]
        return torch.cat([*outputs, self.value(pooled)], dim=-1)


def with_weights(build: Callable[[], _Network], tensors: Mapping[str, torch.Tensor]) -> _Network:
    """A network with weights that were saved.

    Args:
        build: Makes it. First on the meta device, where no size takes memory: a file may say any.
        tensors: The weights by name.

    Raises:
        RuntimeError: They are not the network's.
    """
    with torch.device("meta"):
        build().load_state_dict(tensors, assign=True)
    network = build()
    network.load_state_dict(tensors)
    return network
