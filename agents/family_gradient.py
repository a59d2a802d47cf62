"""A policy trained through the critic: its own gradient says how widths have to change, so that nothing is explored."""

from collections.abc import Sequence
from typing import Any

import torch

from agents.family_critic import FamilyCritic
from agents.width_scaling import SCALED, family_inputs, scaled_fractions
from rap_env.evaluation.width_predictor import ContinuousPredictor
from rap_env.policies import WidthPolicy
from rap_env.policies.width import WidthNetwork
from rap_env.rng import isolated_rng


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

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> WidthPolicy:
        shape, predictor = critic.shape, ContinuousPredictor(critic.predictor)
        scenarios = critic.contexts(self._contexts)
        seen, room, sizes = family_inputs(shape, scenarios)
        curve = []
        with isolated_rng(critic.task.seed):
            network = WidthNetwork(len(shape.components.sites), self._layers, "relu", squashed=True)
            torch.nn.init.zeros_(network.linears[-1].weight)  # equal widths at first
            torch.nn.init.zeros_(network.linears[-1].bias)
            optimizer = torch.optim.Adam(network.parameters(), lr=self._learning_rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._steps)
            for step in range(self._steps):
                drawn = torch.randint(len(scenarios), (self._batch,))
                actions = network({name: entry[drawn] for name, entry in seen.items()}).double()
                kept = scaled_fractions(actions, sizes[drawn], room[drawn])
                mean, deviation = predictor.predict(kept * predictor.n_parts)
                loss = (mean + critic.fear * deviation).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                curve.append([step + 1, loss.item()])
        details |= {"learning_curve": [curve[-1 - offset] for offset in range(0, self._steps, 100)][::-1]}
        return WidthPolicy(shape, network, SCALED)
