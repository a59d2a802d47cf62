"""Rewards relative to the greedy order's: less variance, the same optimum."""

from typing import Any

import gymnasium

from rap_env.importance.source import ImportanceSource
from rap_env.policies import OrderPolicy
from rap_env.problem import PruningProblem


class RelativeReward(gymnasium.Wrapper):
    """Subtracts, at the end of an episode, the reward of the greedy order's mask for the same scenario.

    How well a scenario can be served at all depends mostly on its budget, and that would drown what the agent's own
    choices changed. The subtracted reward depends on the scenario only, so the best policy stays the best (a baseline
    as in self-critical sequence training, arXiv 1612.00563). The masks along one order are few, so that this costs a
    few dozen evaluations in a whole training.

    Args:
        env: A pruning environment.
        problem: Judges the greedy masks; counted in its evaluation budget.
        importance: The greedy order.
    """

    def __init__(self, env: gymnasium.Env, problem: PruningProblem, importance: ImportanceSource) -> None:
        super().__init__(env)
        self._problem = problem
        self._greedy = OrderPolicy(problem.shape, importance.static)

    def step(self, action: Any):
        observation, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            scenario = info["scenario"]
            mask = self._greedy.decide(scenario.workload, scenario.budget_bytes)
            outcome = self._problem.evaluate(mask, scenario.workload, scenario.budget_bytes)
            info["absolute_reward"] = reward
            reward = float(reward) - self._problem.reward(outcome)
        return observation, reward, terminated, truncated, info

    def action_masks(self):
        return self.env.get_wrapper_attr("action_masks")()
