"""Metrics of a comparison, as costs: lower is better, and a scenario whose budget is violated costs infinity.

Interquartile means with bootstrap intervals, as "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
asks (arXiv 2108.13264). Its library rliable would bring six more packages (arch, statsmodels, seaborn, ...), and it
resamples every task by itself; here one seed's policy serves all scenarios, so whole seeds are resampled.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import trim_mean

from experiments.report.comparison import SEARCH, Comparison

FEWEST_FOR_INTERVAL = 5  # seeds; resampling fewer says nothing that their range does not say
SPREAD = f"the range over seeds, from {FEWEST_FOR_INTERVAL} seeds on a 95% bootstrap interval"  # of brackets and bars
_RESAMPLES = 2000

Statistic = Callable[[np.ndarray], np.ndarray]  # [..., seeds, scenarios] -> [...] or [..., scenarios]


def loss_over_dense(comparison: Comparison, agent: str, evaluator: str) -> np.ndarray:
    """The dense model's score minus the agent's: by text the increase of log-perplexity, by tasks lost accuracy."""
    return comparison.dense_scores(evaluator) - comparison.scores(agent, evaluator)


def regret(comparison: Comparison, agent: str, evaluator: str) -> np.ndarray:
    """The best known score of each scenario minus the agent's."""
    scores = comparison.scores(agent, evaluator)
    served = np.isfinite(scores)
    best = np.broadcast_to(best_known(comparison, evaluator), scores.shape)
    return np.where(served, np.where(served, best, 0.0) - np.where(served, scores, 0.0), np.inf)


def best_known(comparison: Comparison, evaluator: str) -> np.ndarray:
    """The best score [scenarios] of any agent's mask that fits; minus infinity where there is none.

    Masks that a search evaluated but did not choose in the end are known too, to the search half only.
    """
    best = np.max([comparison.scores(agent, evaluator).max(axis=0) for agent in comparison.agents], axis=0)
    if evaluator == SEARCH:
        runs = [record["results"] for record in comparison.records]
        evaluated = [
            [-np.inf if (s := row["best_evaluated"]) is None else s + comparison.shift(run) for row in run["rows"]]
            for run in runs
        ]
        best = np.maximum(best, np.max(evaluated, axis=0))
    return best


def interquartile_mean(costs: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all [..., seeds, scenarios] costs."""
    return trim_mean(costs.reshape(*costs.shape[:-2], -1), 0.25, axis=-1)


def plain_mean(costs: np.ndarray) -> np.ndarray:
    """Mean of all [..., seeds, scenarios] costs: small budgets, where masks differ most, weigh most."""
    return costs.mean(axis=(-2, -1))


def scenario_means(costs: np.ndarray) -> np.ndarray:
    """Mean [..., scenarios] over the seeds of [..., seeds, scenarios]."""
    return costs.mean(axis=-2)


def with_spread(
    costs: np.ndarray, statistic: Statistic = interquartile_mean
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of costs [seeds, scenarios], and how it spreads over the seeds.

    Returns:
        Value, low and high end: of fewer than 5 seeds the range of what each seed has alone, of more the percentile
        bootstrap's 95% interval. All are equal for a single seed, which tells nothing of the spread.
    """
    if len(costs) < FEWEST_FOR_INTERVAL:
        of_seeds = statistic(costs[:, None])
        return statistic(costs), of_seeds.min(axis=0), of_seeds.max(axis=0)
    chosen = np.random.default_rng(0).integers(len(costs), size=(_RESAMPLES, len(costs)))
    resampled = statistic(costs[chosen])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0, method="nearest")  # infinities don't interpolate
    return statistic(costs), low, high
