"""One-step training on masks that fit: what the agent wishes, projected onto the budget."""

import gymnasium
import numpy as np

from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from rap_env.policies.walk import fit_to_budget


class ProjectToBudget(gymnasium.Wrapper):
    """Hands the environment masks that fit, as `OneStepPolicy` does when it serves.

    The gradient belongs to the agent's own bits, as in FastForward (arXiv 2511.18977). Without the projection half of
    a small training goes into hitting the budget, which arithmetic does better.

    Args:
        env: A `rap/Pruning-v0`.
        importance: The order along which components go, or come back.
    """

    def __init__(self, env: gymnasium.Env, importance: ImportanceSource) -> None:
        super().__init__(env)
        self._order = importance.static
        self._scenario = None

    def reset(self, **arguments):
        observation, info = super().reset(**arguments)
        self._scenario = info["scenario"]
        return observation, info

    def step(self, action: np.ndarray):
        shape, scenario = self.env.unwrapped.shape, self._scenario
        wish = PruningMask.from_bits(shape, action)
        mask = fit_to_budget(wish, shape, self._order, scenario.workload, scenario.budget_bytes)
        return super().step(np.array(mask.keep, dtype=np.int8))
