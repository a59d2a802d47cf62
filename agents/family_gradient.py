"""A policy trained through the critic: its own gradient says how widths have to change, so that nothing is explored."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agents.family_critic import FamilyCritic
from rap_env.evaluation.width_predictor import ContinuousPredictor, WidthPredictor
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

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> WidthPolicy:
        with isolated_rng(critic.task.seed):
            training = _Training(critic, self._contexts, self._layers, self._learning_rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, self._steps)
            curve = [[step, training.step(critic, self._batch, schedule)] for step in range(1, self._steps + 1)]
        details |= {"learning_curve": [curve[-1 - offset] for offset in range(0, self._steps, 100)][::-1]}
        return training.policy(critic)


class GradientGuide:
    """The same network while a search goes on: it is trained on whenever the predictor has learned, never from new.

    Args:
        first_steps: Of the optimiser, when it is asked for the first time.
        steps: Whenever it is asked again.
        batch: Contexts in a step.
        contexts: That batches are drawn from.
        learning_rate: Always.
        layers: Units of the network's hidden layers.
    """

    def __init__(
        self,
        first_steps: int = 600,
        steps: int = 100,
        batch: int = 64,
        contexts: int = 1024,
        learning_rate: float = 1e-3,
        layers: Sequence[int] = (256, 256, 128),
    ) -> None:
        self._first_steps, self._steps, self._batch, self._contexts = first_steps, steps, batch, contexts
        self._learning_rate, self._layers = learning_rate, tuple(layers)
        self._training: _Training | None = None

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> WidthPolicy:
        asked = details["guided"] = details.get("guided", 0) + 1
        with isolated_rng(critic.task.seed + asked):
            if self._training is None:
                self._training = _Training(critic, self._contexts, self._layers, self._learning_rate)
            for _ in range(self._first_steps if asked == 1 else self._steps):
                self._training.step(critic, self._batch)
        return self._training.policy(critic)


class _Training:
    """A network, and the contexts that it is trained for.

    Args:
        critic: Of the family; the network is trained through that of each step.
        contexts: That batches are drawn from.
        layers: Units of the network's hidden layers.
        learning_rate: Of Adam.
    """

    def __init__(self, critic: FamilyCritic, contexts: int, layers: Sequence[int], learning_rate: float) -> None:
        shape = critic.shape
        self._seen, self._room, self._sizes = _inputs(shape, critic.contexts(contexts))
        self._network = WidthNetwork(len(shape.components.sites), layers, "relu", squashed=True)
        torch.nn.init.zeros_(self._network.linears[-1].weight)  # equal widths at first
        torch.nn.init.zeros_(self._network.linears[-1].bias)
        self.optimizer = torch.optim.Adam(self._network.parameters(), lr=learning_rate)
        self._predictor: tuple[WidthPredictor, ContinuousPredictor] | None = None

    def step(self, critic: FamilyCritic, batch: int, schedule: torch.optim.lr_scheduler.LRScheduler | None = None):
        """One step of the optimiser; the mean of what the batch's masks are feared to lose."""
        if self._predictor is None or self._predictor[0] is not critic.predictor:
            self._predictor = critic.predictor, ContinuousPredictor(critic.predictor)
        predictor = self._predictor[1]
        drawn = torch.randint(len(self._room), (batch,))
        actions = self._network({name: entry[drawn] for name, entry in self._seen.items()})
        fractions = ((actions.double() + 1.0) / 2.0).clamp(min=_LEAST)
        kept = scaled_to_fit(fractions, self._sizes[drawn], self._room[drawn])
        mean, deviation = predictor.predict(kept * predictor.n_parts)
        loss = (mean + critic.fear * deviation).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if schedule:
            schedule.step()
        return loss.item()

    def policy(self, critic: FamilyCritic) -> WidthPolicy:
        """A copy of the network as a policy."""
        return WidthPolicy(critic.shape, copy.deepcopy(self._network), Projection(NESTED, _LEAST, "affine"))


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
