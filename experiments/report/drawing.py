"""What the figures of a page share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Template

import numpy as np
from plotly.colors import qualitative
from plotly.graph_objects import Figure, Scatter
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from experiments.report.comparison import Comparison
from experiments.report.metrics import interquartile_mean, loss_over_dense

GUIDE = {"dash": "dot", "color": "#888", "width": 1}
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star")
_FAR_OFF = 1.5  # times the best agent's loss
_OPTIONS = {"displayModeBar": False, "responsive": True}
_PAGE = Template("<!doctype html><meta charset='utf-8'><script>$plotly</script>$figure<p>$caption</p>")


@dataclass(frozen=True)
class PageFigure:
    """A figure with what a reader must know to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def __post_init__(self) -> None:
        self.figure.update_layout(
            template="plotly_white",
            font={"family": "system-ui, sans-serif", "size": 13},
            legend={"orientation": "h", "y": -0.22, "yanchor": "top"},
            margin={"l": 70, "r": 20, "t": 40, "b": 60},
        )


def drawn(shown: PageFigure) -> str:
    """A figure as a piece of HTML, without Plotly."""
    name = f"figure-{shown.name}"
    return to_html(shown.figure, config=_OPTIONS, include_plotlyjs=False, full_html=False, div_id=name)


def page_of_one(shown: PageFigure) -> str:
    """A page with one figure: one file that loads nothing."""
    return _PAGE.substitute(plotly=get_plotlyjs(), figure=drawn(shown), caption=shown.caption)


def is_far_off(comparison: Comparison, agent: str) -> bool:
    """Whether an agent loses so much more than the best that the others would lie on one line."""
    losses = _means(comparison, loss_over_dense, comparison.evaluators[0])
    return bool(np.isfinite(losses[agent]) and losses[agent] > _FAR_OFF * max(0.0, min(losses.values())))


def style(comparison: Comparison, agent: str, without: str = "") -> dict:
    """The same colour and symbol for an agent in every figure; who is far off is drawn when its name is clicked.

    Args:
        comparison: Of all agents.
        agent: One of them.
        without: What the trace does not take: `"marker"` or `"line"`.
    """
    number = comparison.agents.index(agent)
    colour = qualitative.Dark24[number % len(qualitative.Dark24)]
    styles = {
        "name": agent,
        "legendgroup": agent,
        "visible": "legendonly" if is_far_off(comparison, agent) else True,
        "marker": {"color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8},
        "line": {"color": colour, "width": 2},
    }
    return {key: value for key, value in styles.items() if key != without}


def finite(values: np.ndarray) -> list[float | None]:
    """JSON's form of an array: a gap where there is no number."""
    return [float(value) if np.isfinite(value) else None for value in np.atleast_1d(values)]


def error_bars(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict:
    with np.errstate(invalid="ignore"):  # infinity minus infinity is a gap
        up, down = finite(high - value), finite(value - low)
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}


def workloads(comparison: Comparison) -> dict[str, list[int]]:
    """Positions of each workload's scenarios."""
    positions: dict[str, list[int]] = {}
    for position, (workload, _budget) in enumerate(comparison.scenarios):
        positions.setdefault(workload, []).append(position)
    return positions


def served(comparison: Comparison, cost: Callable, evaluator: str) -> list[str]:
    """Agents with a finite interquartile mean: the others violate more than a quarter of the budgets."""
    means = _means(comparison, cost, evaluator)
    return sorted((agent for agent, mean in means.items() if np.isfinite(mean)), key=means.__getitem__)


def _means(comparison: Comparison, cost: Callable, evaluator: str) -> dict[str, np.ndarray]:
    return {agent: interquartile_mean(cost(comparison, agent, evaluator)) for agent in comparison.agents}


def spread_line(name: str, place: int, x: Sequence[float], spreads: Sequence[tuple[float, float, float]]) -> Scatter:
    """An agent's line with error bars.

    Args:
        name: Of the agent.
        place: Among the agents: its colour and symbol.
        x: Of each point.
        spreads: Value, low and high end of each point.
    """
    value, low, high = (np.array(ends) for ends in zip(*spreads, strict=True))
    colour, symbol = qualitative.Dark24[place % 24], SYMBOLS[place % len(SYMBOLS)]
    return Scatter(
        x=x,
        y=finite(value),
        error_y=error_bars(value, low, high),
        name=name,
        mode="lines+markers",
        marker={"color": colour, "symbol": symbol, "size": 8},
        line={"color": colour, "width": 2},
    )
