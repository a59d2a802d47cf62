"""Hindsight for widths: a mask that was evaluated for one context is an example for every other one."""

from dataclasses import replace
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer

from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.observation import KIND, observe_widths


class RelabellingBuffer(DictReplayBuffer):
    """A replay buffer of one-step episodes that adds each mask again for other contexts (arXiv 1707.01495).

    What a mask scores does not depend on the context, as long as it fits and the kind of text is the same. So another
    workload of that kind is drawn from the family, with the budget that the mask needs for it: there the fractions that
    it keeps are an action whose projection is this mask again, whatever the projection, and its reward is the one that
    was measured. Of workloads at which that budget is beyond the family's none is added.

    Args:
        arguments: Those of Stable-Baselines3's buffer.
        shape: The model.
        sampler: Draws contexts.
        copies: For each evaluated mask, how many workloads are drawn.
        seed: Of the drawing.
        options: Further keyword arguments of that buffer.
    """

    def __init__(self, *arguments, shape, sampler: ScenarioSampler, copies: int, seed: int, **options) -> None:
        super().__init__(*arguments, **options)
        self._shape, self._sampler, self._copies = shape, sampler, copies
        self._generator, self._dense = np.random.default_rng(seed), PruningMask.all_kept(shape)
        self._waiting: list[tuple[dict[str, np.ndarray], np.ndarray, float]] = []

    def add(self, obs, next_obs, action, reward, done, infos: list[dict[str, Any]]) -> None:
        """Adds a step of all environments, and rows of relabelled ones as soon as there are enough for one."""
        super().add(obs, next_obs, action, reward, done, infos)
        for index, of_episode in enumerate(reward.tolist()):
            seen = infos[index]["terminal_observation"]
            mask = PruningMask.from_widths(
                self._shape, np.rint(seen["widths"] * self._dense.widths).astype(int).tolist()
            )
            kind = self._sampler.kinds[int(seen[KIND].argmax())] if KIND in seen else ""
            for _ in range(self._copies):
                self._relabel(mask, kind, of_episode)
        n = self.n_envs
        while len(self._waiting) >= n:
            rows, self._waiting = self._waiting[:n], self._waiting[n:]
            seen = {name: np.stack([row[0][name] for row in rows]) for name in rows[0][0]}
            actions, rewards = np.stack([row[1] for row in rows]), np.array([row[2] for row in rows])
            super().add(seen, seen, actions, rewards, np.ones(n), [{} for _ in rows])

    def _relabel(self, mask: PruningMask, kind: str, reward: float) -> None:
        workload = replace(self._sampler.sample(self._shape, self._generator).workload, kind=kind)
        needed = footprint(self._shape, mask, workload).peak_bytes
        ratio = needed / dense_bytes(self._shape, workload)
        if self._sampler.covers(workload.batch_size, workload.prompt_tokens, ratio):
            seen = observe_widths(self._shape, Scenario(workload, needed), self._dense, self._sampler.kinds)
            action = 2.0 * np.array(mask.widths) / self._dense.widths - 1.0
            self._waiting.append((seen, action.astype(np.float32), reward))
