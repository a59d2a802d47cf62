"""Policy gradient over whole masks: several masks for one scenario, each compared with the mean of all."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rap_env.envs.observation import observe
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.policies.network import ComponentNetwork
from rap_env.policies.walk import fit_to_budget
from rap_env.rng import isolated_rng

_SAMPLES = 12  # masks for each scenario
_LEARNING_RATE = 3e-3


class PolicyGradient:
    """Trains a one-step policy network with REINFORCE and a baseline for each scenario: the mean of its own samples.

    Keep-bits are drawn independently, then projected onto the budget along the importance order as in `OneStepPolicy`;
    the gradient belongs to the drawn bits (FastForward, arXiv 2511.18977). Rewards are divided by their deviation
    within the scenario, so that tight and loose budgets weigh alike (as in GRPO, arXiv 2402.03300).

    Args:
        shape: The model.
        order: All component names, the first to go first.
        width: Hidden units of the network.
        seed: Of the network's weights and of the samples.
    """

    def __init__(self, shape, order: Sequence[str], width: int, seed: int) -> None:
        self._shape, self._order = shape, tuple(order)
        with isolated_rng(seed):
            self.network = ComponentNetwork(shape, sequential=False, width=width)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=_LEARNING_RATE)
        self._generator = np.random.default_rng(seed)
        self._ranks = np.array([self._order.index(component.name) for component in shape.components])

    def step(self, scenarios: Sequence[Scenario], reward: Callable[[list[PruningMask]], np.ndarray]) -> float:
        """One gradient step on fresh samples; returns their mean reward.

        Args:
            scenarios: S scenarios.
            reward: Rewards [N] of masks.
        """
        logits = self._logits(scenarios)
        bits, masks = self._sample(logits.detach(), scenarios)
        rewards = torch.from_numpy(reward(masks).reshape(bits.shape[:2])).float()
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
        logprobs = torch.distributions.Bernoulli(logits=logits[:, None]).log_prob(bits).sum(-1)
        loss = -(advantages * logprobs).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return rewards.mean().item()

    @torch.inference_mode()
    def propose(self, scenario: Scenario, n_masks: int) -> list[PruningMask]:
        """Distinct masks that fit: the policy's own choice first, then samples."""
        logits = self._logits([scenario])
        _bits, masks = self._sample(logits, [scenario])
        return list(dict.fromkeys([self._project(logits[0] > 0, scenario), *masks]))[:n_masks]

    def _logits(self, scenarios: Sequence[Scenario]) -> torch.Tensor:
        """Logits [S, n] of keeping each component; before any training they follow the importance order."""
        dense = PruningMask.all_kept(self._shape)
        entries = [observe(self._shape, scenario, dense, self._order) for scenario in scenarios]
        batch = {name: torch.from_numpy(np.stack([entry[name] for entry in entries])) for name in entries[0]}
        return self.network(batch)[:, : self.network.n_actions] + self._prior(scenarios)

    def _prior(self, scenarios: Sequence[Scenario]) -> torch.Tensor:
        """Soft cuts of the order where its walk ends, for each scenario."""
        dense, rows = PruningMask.all_kept(self._shape), []
        for scenario in scenarios:
            mask = fit_to_budget(dense, self._shape, self._order, scenario.workload, scenario.budget_bytes)
            cut = 1 + max((self._order.index(component.name) for component in mask.dropped), default=-1)
            rows.append((self._ranks + 0.5 - cut) / (0.1 * len(self._ranks)))
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def _sample(self, logits: torch.Tensor, scenarios: Sequence[Scenario]) -> tuple[torch.Tensor, list[PruningMask]]:
        """Bits [S, K, n] and their projections, S times K masks."""
        probabilities = torch.sigmoid(logits).numpy()[:, None]
        drawn = self._generator.random((len(scenarios), _SAMPLES, probabilities.shape[-1])) < probabilities
        masks = [self._project(bits, scenario) for row, scenario in zip(drawn, scenarios, strict=True) for bits in row]
        return torch.from_numpy(drawn).float(), masks

    def _project(self, bits, scenario: Scenario) -> PruningMask:
        wish = PruningMask.from_bits(self._shape, np.asarray(bits, dtype=np.int8))
        return fit_to_budget(wish, self._shape, self._order, scenario.workload, scenario.budget_bytes)
