"""The pictures of a comparison."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from plotly.colors import qualitative
from plotly.graph_objects import Figure, Heatmap, Scatter
from plotly.subplots import make_subplots

from experiments.comparison import SEARCH, Comparison
from experiments.merit import interquartile_mean, loss_over_dense, regret, scenario_means, with_interval
from rap_env.mask import ATTENTION, KINDS

_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star")
_KEPT = [[0.0, "#f4f1ea"], [1.0, "#27566b"]]
_FAR_OFF = 1.5  # times the best agent's loss
_GUIDE = {"dash": "dot", "color": "#888", "width": 1}
_KEPT_HOVER = "layer %{x}, budget %{customdata}<br>kept by %{z:.0%} of seeds<extra></extra>"


@dataclass(frozen=True)
class Exhibit:
    """A figure with what a reader must know to read it."""

    name: str
    title: str
    caption: str
    figure: Figure


def exhibits(comparison: Comparison) -> list[Exhibit]:
    """Every figure, in the order of the page."""
    shown = [_score_against_budget(comparison, judge) for judge in comparison.judges]
    shown += [_regret(comparison), _attention_share(comparison)]
    shown += [_kept(comparison, agent) for agent in comparison.agents if _keeping(comparison, agent).min() < 1]
    shown += [_anytime(comparison), _quality_against_evaluations(comparison)]
    if _episodes(comparison):
        shown.append(_learning(comparison))
    for exhibit in shown:
        exhibit.figure.update_layout(
            template="plotly_white",
            font={"family": "system-ui, sans-serif", "size": 13},
            legend={"orientation": "h", "y": -0.22, "yanchor": "top"},
            margin={"l": 70, "r": 20, "t": 40, "b": 60},
        )
    return shown


def _is_far_off(comparison: Comparison, agent: str) -> bool:
    """Whether an agent loses so much more than the best that the others would lie on one line."""
    judge = comparison.judges[0]
    means = {name: interquartile_mean(loss_over_dense(comparison, name, judge)) for name in comparison.agents}
    return bool(np.isfinite(means[agent]) and means[agent] > _FAR_OFF * max(0.0, min(means.values())))


def _style(comparison: Comparison, agent: str) -> dict:
    """The same colour and symbol for an agent in every figure; who is far off is drawn when its name is clicked."""
    number = comparison.agents.index(agent)
    colour = qualitative.Dark24[number % len(qualitative.Dark24)]
    return {
        "name": agent,
        "legendgroup": agent,
        "visible": "legendonly" if _is_far_off(comparison, agent) else True,
        "marker": {"color": colour, "symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": 8},
        "line": {"color": colour, "width": 2},
    }


def _error_bars(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict:
    up, down = _finite(high - value), _finite(value - low)
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}


def _finite(values: np.ndarray) -> list[float | None]:
    """JSON's form of an array: a gap where there is no number."""
    return [float(value) if np.isfinite(value) else None for value in np.atleast_1d(values)]


def _workloads(comparison: Comparison) -> dict[str, list[int]]:
    """Positions of each workload's scenarios."""
    positions: dict[str, list[int]] = {}
    for position, (workload, _budget) in enumerate(comparison.scenarios):
        positions.setdefault(workload, []).append(position)
    return positions


def _served(comparison: Comparison, cost: Callable, judge: str) -> list[str]:
    """Agents with a finite interquartile mean: the others violate more than a quarter of the budgets."""
    means = {agent: interquartile_mean(cost(comparison, agent, judge)) for agent in comparison.agents}
    return sorted((agent for agent, mean in means.items() if np.isfinite(mean)), key=means.__getitem__)


def _score_against_budget(comparison: Comparison, judge: str) -> Exhibit:
    text, workloads = comparison.is_text(judge), _workloads(comparison)
    figure = make_subplots(
        1, len(workloads), subplot_titles=list(workloads), shared_yaxes=True, horizontal_spacing=0.02
    )
    lowest = np.inf
    for number, agent in enumerate(comparison.agents):
        with np.errstate(invalid="ignore"):  # infinity minus infinity is a gap
            value, low, high = with_interval(loss_over_dense(comparison, agent, judge), scenario_means)
            bars = [_error_bars(value[chosen], low[chosen], high[chosen]) for chosen in workloads.values()]
        if not np.isfinite(value).any():
            continue  # it violates every budget
        lowest = min(lowest, value.min(), low.min())
        for column, chosen in enumerate(workloads.values(), 1):
            aside = 0.4 * (number - (len(comparison.agents) - 1) / 2)  # so that bars don't hide each other
            budgets = [100 * comparison.scenarios[position][1] + aside for position in chosen]
            trace = Scatter(x=budgets, y=_finite(value[chosen]), error_y=bars[column - 1], mode="lines+markers")
            figure.add_trace(trace.update(showlegend=column == 1, **_style(comparison, agent)), 1, column)
    figure.update_xaxes(title="budget, % of dense")
    name = "log-perplexity over dense (nats)" if text else "accuracy below dense"
    figure.update_yaxes(title=name, col=1)
    if text and lowest > 0:
        figure.update_yaxes(type="log")
    figure.update_layout(height=460)
    caption = (
        "How much worse than the unpruned model each policy's masks are on the report half, lower is better. Points are"
        " means over seeds, bars 95% bootstrap intervals over seeds. A gap is a budget that was violated."
        " Click on a faint name to see an agent that is far off."
    )
    return Exhibit(f"score_{judge}", f"Report against budget: {judge}", caption, figure)


def _regret(comparison: Comparison) -> Exhibit:
    judges = [SEARCH, *comparison.judges]
    figure = make_subplots(1, len(judges), subplot_titles=judges, horizontal_spacing=0.14)
    for column, judge in enumerate(judges, 1):
        for agent in reversed(_served(comparison, regret, judge)):
            if _is_far_off(comparison, agent):
                continue
            value, low, high = with_interval(regret(comparison, agent, judge))
            style = {key: entry for key, entry in _style(comparison, agent).items() if key != "line"}
            bars = _error_bars(value, low, high)
            trace = Scatter(x=_finite(value), y=[agent], error_x=bars, mode="markers", showlegend=False, **style)
            figure.add_trace(trace, 1, column)
    figure.update_xaxes(title="regret", rangemode="tozero")
    figure.update_yaxes(ticklabelstandoff=8)
    figure.update_layout(height=160 + 34 * len(comparison.agents))
    caption = (
        "Best known score of a scenario minus the score reached: interquartile mean over scenarios and seeds, 95%"
        " bootstrap interval over seeds. Best known is the best mask of any agent here that fits; on the search half"
        " also any that was only asked about. Left out: who violates more than a quarter of the budgets, and who loses"
        " more than half as much again as the best; the table has them."
    )
    return Exhibit("regret", "Regret", caption, figure)


def _keeping(comparison: Comparison, agent: str) -> np.ndarray:
    """Share of the seeds that keep a component, [scenarios, components]."""
    kept = [
        [[name not in set(row["dropped"]) for name in comparison.components] for row in run["rows"]]
        for run in comparison.runs(agent)
    ]
    return np.mean(kept, axis=0)


def _of_kind(comparison: Comparison, kind: str) -> list[int]:
    return [index for index, name in enumerate(comparison.components) if name.split(".")[1] == kind]


def _attention_share(comparison: Comparison) -> Exhibit:
    workloads = _workloads(comparison)
    figure = Figure()
    for agent in comparison.agents:
        dropped = 1 - _keeping(comparison, agent)
        counts = [dropped[chosen].sum(axis=0) for chosen in workloads.values()]
        shares = [
            float(count[_of_kind(comparison, ATTENTION)].sum() / count.sum()) if count.sum() else None
            for count in counts
        ]
        if any(share is not None for share in shares):
            trace = Scatter(x=list(workloads), y=shares, mode="lines+markers", **_style(comparison, agent))
            figure.add_trace(trace)
    figure.add_hline(y=0.5, line=_GUIDE)
    figure.update_yaxes(title="attentions among what is dropped", range=[-0.05, 1.05], tickformat=".0%")
    figure.update_layout(height=420)
    caption = (
        "The flip: with few tokens the bytes lie in the MLPs' weights, with many in the KV cache that only attentions"
        " fill. What pays to drop moves from MLPs to attentions; lines that rise to the right follow it."
    )
    return Exhibit("attention_share", "What is dropped at each workload", caption, figure)


def _kept(comparison: Comparison, agent: str) -> Exhibit:
    workloads, keeping = _workloads(comparison), _keeping(comparison, agent)
    titles = [f"{workload}<br>{kind}" for kind in ("attention", "MLP") for workload in workloads]
    figure = make_subplots(2, len(workloads), subplot_titles=titles, horizontal_spacing=0.02, vertical_spacing=0.24)
    for row, kind in enumerate(KINDS, 1):
        positions = _of_kind(comparison, kind)
        layers = [
            comparison.components[position].replace(f".{kind}", "").removeprefix("layer") for position in positions
        ]
        for column, chosen in enumerate(workloads.values(), 1):
            budgets = [f"{comparison.scenarios[position][1]:.0%}" for position in chosen]
            share = keeping[np.ix_(chosen, positions)]
            labels = [f"{budget}: {kept.sum():.0f} kept" for budget, kept in zip(budgets, share, strict=True)]
            trace = Heatmap(z=share.tolist(), x=layers, y=budgets, coloraxis="coloraxis", xgap=1, ygap=1)
            figure.add_trace(trace.update(customdata=[[label] * len(layers) for label in labels]), row, column)
            figure.data[
                -1
            ].hovertemplate = "layer %{x}, budget %{customdata}<br>kept by %{z:.0%} of seeds<extra></extra>"
            figure.update_yaxes(showticklabels=column == 1, autorange="reversed", row=row, col=column)
    figure.update_xaxes(type="category", nticks=8)
    figure.update_xaxes(title="layer", row=2)
    figure.update_layout(
        height=400,
        coloraxis={"colorscale": _KEPT, "cmin": 0, "cmax": 1, "colorbar": {"title": "of seeds", "tickformat": ".0%"}},
    )
    figure.update_annotations(font_size=12)
    caption = "Dark components are kept at that budget, light ones dropped; shades between are seeds that differ."
    return Exhibit(f"kept_{agent}", f"What {agent} keeps", caption, figure)


def _anytime(comparison: Comparison) -> Exhibit:
    figure = Figure()
    end = max(run["search"]["evaluations"] for record in comparison.records for run in [record["results"]])
    for agent in comparison.agents:
        curves = [run["anytime"] for run in comparison.runs(agent)]
        style = _style(comparison, agent)
        if all(curves):
            steps = sorted({int(step) for curve in curves for step, _score in curve})
            steps = [step for step in steps if step >= max(curve[0][0] for curve in curves)]
            means = [comparison.best_after(agent, step) for step in steps]
            figure.add_trace(Scatter(x=steps, y=means, mode="lines", line_shape="hv", **_as_line(style)))
        elif not any(run["search"]["evaluations"] for run in comparison.runs(agent)):
            mean = comparison.scores(agent, SEARCH).mean()
            if np.isfinite(mean):
                style["line"] |= {"dash": "dash"}
                figure.add_trace(Scatter(x=[0, end], y=[float(mean)] * 2, mode="lines", **_as_line(style)))
    figure.update_xaxes(title="evaluations: distinct masks asked about")
    figure.update_yaxes(title="best search score so far")
    figure.update_layout(height=460)
    caption = (
        "After so many evaluations, the best mask asked about so far that fits, mean over the scenarios and seeds; it"
        " begins when every scenario has one. Dashed: agents that ask nothing, at their policy's score."
    )
    return Exhibit("anytime", "Search score against evaluations", caption, figure)


def _as_line(style: dict) -> dict:
    return {key: value for key, value in style.items() if key != "marker"}


def _quality_against_evaluations(comparison: Comparison) -> Exhibit:
    judge, figure = comparison.judges[0], Figure()
    for agent in _served(comparison, loss_over_dense, judge):
        value, low, high = with_interval(loss_over_dense(comparison, agent, judge))
        spent = float(np.mean([run["search"]["evaluations"] for run in comparison.runs(agent)]))
        trace = Scatter(x=[spent], y=_finite(value), error_y=_error_bars(value, low, high), mode="markers")
        figure.add_trace(trace.update(**_style(comparison, agent)))
    figure.update_xaxes(title="evaluations spent", rangemode="nonnegative", zeroline=False)
    figure.update_yaxes(title=f"{'log-perplexity over' if comparison.is_text(judge) else 'accuracy below'} dense")
    figure.update_layout(height=420, showlegend=True)
    caption = f"Interquartile mean over scenarios and seeds on {judge}, lower is better; 95% bootstrap interval."
    return Exhibit("quality", "Quality against evaluations spent", caption, figure)


def _episodes(comparison: Comparison) -> dict[str, list[list[float]]]:
    """For each agent that learns by episodes, its seeds' gains over the greedy order."""
    gains = {
        agent: [run["search"]["details"].get("episodes", {}).get("gain_over_greedy") for run in comparison.runs(agent)]
        for agent in comparison.agents
    }
    return {agent: of_seeds for agent, of_seeds in gains.items() if all(of_seeds)}


def _learning(comparison: Comparison) -> Exhibit:
    figure = Figure()
    for agent, of_seeds in _episodes(comparison).items():
        length = min(map(len, of_seeds))
        mean = np.mean([gains[:length] for gains in of_seeds], axis=0)
        window = max(1, length // 20)
        smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
        x = list(range(window, length + 1))
        figure.add_trace(Scatter(x=x, y=smooth.tolist(), mode="lines", **_as_line(_style(comparison, agent))))
    figure.add_hline(y=0, line=_GUIDE)
    figure.update_xaxes(title="training episodes")
    figure.update_yaxes(title="reward minus the greedy order's")
    figure.update_layout(height=420, showlegend=True)
    caption = "Running mean over a twentieth of the training, mean over seeds. Above zero the agent beats the order."
    return Exhibit("learning", "Learning curves", caption, figure)
