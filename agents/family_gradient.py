"""A policy trained through the critic: its own gradient says how widths have to change, so that nothing is explored."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agents.family_critic import FamilyCritic
from rap_env.evaluation.width_predictor import ContinuousPredictor
from rap_env.mask import PruningMask
from rap_env.memory.footprint import smallest_bytes
from rap_env.memory.projection import NESTED, Projection, site_bytes
from rap_env.memory.scenario import Scenario
from rap_env.observation import observe_widths
from rap_env.policies import WidthPolicy
from rap_env.policies.width import WidthNetwork
from rap_env.rng import isolated_rng

_LEAST = 1e-12  # keep fraction: a site may go, and orders by fractions stay defined
_HALVINGS = 60


class GradientPolicy:
    """Trains a network to widths of the least cautious prediction, over contexts of the family, by Adam.

    An action is served by the nested projection, which scales all keep fractions by one number until they fit. That
    number follows from the fractions in closed form, so that the gradient goes through it; only rounding to whole parts
    is left out.

    Args:
        steps: Of the optimiser.
        batch: Contexts in a step.
        contexts: That batches are drawn from.
        learning_rate: At the beginning; it falls to 0 as a cosine does.
        layers: Units of the network's hidden layers.
    """

    def __init__(
        self,
        steps: int = 3000,
        batch: int = 64,
        contexts: int = 4096,
        learning_rate: float = 3e-3,
        layers: Sequence[int] = (256, 256, 128),
    ) -> None:
        self._steps, self._batch, self._contexts = steps, batch, contexts
        self._learning_rate, self._layers = learning_rate, tuple(layers)
        self._projection = Projection(NESTED, _LEAST, "affine")

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> WidthPolicy:
        shape, predictor = critic.shape, ContinuousPredictor(critic.predictor)
        scenarios = critic.contexts(self._contexts)
        seen, room, sizes = _inputs(shape, scenarios)
        curve = []
        with isolated_rng(critic.task.seed):
            network = WidthNetwork(len(shape.components.sites), self._layers, "relu", squashed=True)
            torch.nn.init.zeros_(network.linears[-1].weight)  # equal widths at first
            torch.nn.init.zeros_(network.linears[-1].bias)
            optimizer = torch.optim.Adam(network.parameters(), lr=self._learning_rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._steps)
            for step in range(self._steps):
                drawn = torch.randint(len(scenarios), (self._batch,))
                fractions = (network({name: entry[drawn] for name, entry in seen.items()}).double() + 1.0) / 2.0
                kept = scaled_to_fit(fractions.clamp(min=_LEAST), sizes[drawn], room[drawn])
                mean, deviation = predictor.predict(kept * predictor.n_parts)
                loss = (mean + critic.fear * deviation).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                curve.append([step + 1, loss.item()])
        details |= {"learning_curve": [curve[-1 - offset] for offset in range(0, self._steps, 100)][::-1]}
        return WidthPolicy(shape, network, self._projection)


def scaled_to_fit(fractions: torch.Tensor, sizes: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Keep fractions of S sites, scaled by one number for each of B contexts so that they take all bytes there are.

    Args:
        fractions: Above 0 [B, S].
        sizes: Bytes of whole sites [B, S].
        room: Bytes that all sites may take [B], less than their sum.

    Returns:
        Fractions of at most 1 [B, S]; gradients go through the scaling.
    """
    with torch.no_grad():
        low, high = torch.zeros_like(room), 1.0 / fractions.amin(1)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            over = ((fractions * middle[:, None]).clamp(max=1.0) * sizes).sum(1) > room
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        whole = fractions * low[:, None] >= 1.0
    of_whole, of_others = (sizes * whole).sum(1), (sizes * fractions * ~whole).sum(1)
    scale = (room - of_whole) / of_others
    return torch.where(whole, torch.ones_like(fractions), fractions * scale[:, None]).clamp(max=1.0)


def _inputs(shape, scenarios: Sequence[Scenario]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Observation entries [N, size], bytes that sites may take [N] and those of whole sites [N, S]."""
    dense = PruningMask.all_kept(shape)
    observations = [observe_widths(shape, scenario, dense) for scenario in scenarios]
    entries = {name: torch.from_numpy(np.stack([each[name] for each in observations])) for name in observations[0]}
    rooms = [each.budget_bytes - smallest_bytes(shape, each.workload) for each in scenarios]
    tokens = [each.workload.cached_tokens(shape.attention_window) for each in scenarios]
    sizes = [[of_site[-1] for of_site in site_bytes(shape, cached)] for cached in tokens]
    return entries, torch.tensor(rooms, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
