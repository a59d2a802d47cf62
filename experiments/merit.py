"""Figures of merit of a comparison, as costs: lower is better, and a scenario whose budget is violated costs infinity.

Interquartile means with bootstrap intervals, as "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
asks (arXiv 2108.13264). Its library rliable would bring six more packages (arch, statsmodels, seaborn, ...), and it
resamples every task by itself; here one seed's policy serves all scenarios, so whole seeds are resampled.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import trim_mean

from experiments.comparison import SEARCH, Comparison

GB = 1e9
_RESAMPLES = 2000
_CONFIDENCE = 0.95
_SPENT_PARTS = (8, 4, 2, 1)  # of the most evaluations that anyone asked for

Merit = Callable[[Comparison, str, str], np.ndarray]  # (comparison, agent, judge) -> costs [seeds, scenarios]


def loss_over_dense(comparison: Comparison, agent: str, judge: str) -> np.ndarray:
    """The dense model's score minus the agent's: by text the increase of log-perplexity, by tasks lost accuracy."""
    return comparison.dense_score(judge) - comparison.scores(agent, judge)


def regret(comparison: Comparison, agent: str, judge: str) -> np.ndarray:
    """The best known score of each scenario minus the agent's."""
    scores = comparison.scores(agent, judge)
    served = np.isfinite(scores)
    best = np.broadcast_to(best_known(comparison, judge), scores.shape)
    return np.where(served, np.where(served, best, 0.0) - np.where(served, scores, 0.0), np.inf)


def best_known(comparison: Comparison, judge: str) -> np.ndarray:
    """The best score [scenarios] of any agent's mask that fits; minus infinity where there is none.

    Masks that were asked about in a search but not chosen in the end are known too, to the search half only.
    """
    best = np.max([comparison.scores(agent, judge).max(axis=0) for agent in comparison.agents], axis=0)
    if judge == SEARCH:
        rows = [record["results"]["rows"] for record in comparison.records]
        asked = [[-np.inf if row["best_asked"] is None else row["best_asked"] for row in of_seed] for of_seed in rows]
        best = np.maximum(best, np.max(asked, axis=0))
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


def with_interval(
    costs: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] = interquartile_mean
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of costs [seeds, scenarios] with the percentile bootstrap's 95% interval over seeds.

    Returns:
        Value, low and high end; equal for a single seed, which tells nothing of the spread.
    """
    chosen = np.random.default_rng(0).integers(len(costs), size=(_RESAMPLES, len(costs)))
    tail = 50 * (1 - _CONFIDENCE)
    resampled = statistic(costs[chosen])
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0, method="nearest")  # infinities don't interpolate
    return statistic(costs), low, high


def merit_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and cells; the agent with the least loss on the main judge's report first."""
    judges = comparison.judges
    columns = ["agent", "seeds"]
    columns += [f"IQM {_loss_name(comparison, judge)} ({judge})" for judge in judges]
    columns += [f"IQM regret ({judge})" for judge in (SEARCH, *judges)]
    columns += [f"mean {_loss_name(comparison, judges[0])} ({judges[0]})", f"mean regret ({SEARCH})"]
    columns += ["violations", "unseen violations", "evaluations", "calibration tokens", "search s", "search GB", "ms"]

    def order(agent: str) -> tuple[float, str]:
        return float(interquartile_mean(loss_over_dense(comparison, agent, judges[0]))), agent

    return columns, [_cells(comparison, agent) for agent in sorted(comparison.agents, key=order)]


def spending_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: the search half's loss over dense after so many evaluations, mean over scenarios and seeds.

    Whoever asks nothing stands in column 0, with what its policy's masks lose.
    """
    most = max(run["search"]["evaluations"] for agent in comparison.agents for run in comparison.runs(agent))
    steps = sorted({most // part for part in _SPENT_PARTS} - {0})

    def cells(agent: str) -> list[str]:
        asks = any(run["search"]["evaluations"] for run in comparison.runs(agent))
        unasked = -np.inf if asks else comparison.scores(agent, SEARCH).mean()
        after = [comparison.best_after(agent, step) if asks else -np.inf for step in steps]
        losses = [comparison.dense_score(SEARCH) - score for score in (unasked, *after)]
        return [agent, *(f"{loss:.3f}" if np.isfinite(loss) else "-" for loss in losses)]

    rows = {agent: cells(agent) for agent in comparison.agents}
    best = {agent: [float(cell) for cell in row[1:] if cell != "-"] for agent, row in rows.items()}
    served = sorted((agent for agent in rows if best[agent]), key=lambda agent: min(best[agent]))
    return ["agent", "0", *map(str, steps)], [rows[agent] for agent in served]


def _cells(comparison: Comparison, agent: str) -> list[str]:
    runs = comparison.runs(agent)
    rows = [row for run in runs for row in run["rows"]]
    merits = [(loss_over_dense, judge) for judge in comparison.judges]
    merits += [(regret, judge) for judge in (SEARCH, *comparison.judges)]

    def mean(key: str) -> float:
        return float(np.mean([run["search"][key] for run in runs]))

    return [
        agent,
        str(len(runs)),
        *(_number(*with_interval(merit(comparison, agent, judge))) for merit, judge in merits),
        _number(*with_interval(loss_over_dense(comparison, agent, comparison.judges[0]), plain_mean)),
        _number(*with_interval(regret(comparison, agent, SEARCH), plain_mean)),
        f"{sum(row['violation'] for row in rows)} of {len(rows)}",
        f"{sum(run['unseen']['violations'] for run in runs)} of {sum(run['unseen']['decisions'] for run in runs)}",
        f"{mean('evaluations'):.0f}",
        f"{mean('calibration_tokens'):.0f}",
        f"{mean('seconds'):.1f}",
        f"{mean('peak_bytes') / GB:.2f}",
        f"{np.median([row['decision_milliseconds'] for row in rows]):.2f}",
    ]


def _loss_name(comparison: Comparison, judge: str) -> str:
    return "log-perplexity over dense" if comparison.is_text(judge) else "accuracy below dense"


def _number(value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.3f}" if low == high else f"{value:.3f} [{low:.3f}, {high:.3f}]"
