"""What policies keep: figures over a comparison's seeds, and the picture of a single run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from plotly.graph_objects import Figure, Heatmap, Scatter
from plotly.subplots import make_subplots

from experiments.report.comparison import Comparison
from experiments.report.drawing import GUIDE, PageFigure, style, workloads
from rap_env.components import ATTENTION, KINDS, MLP

_SHADES = [[0.0, "#f4f1ea"], [1.0, "#27566b"]]
_TITLES = {ATTENTION: "attention", MLP: "MLP"}


def kept_picture(record: Mapping[str, Any]) -> np.ndarray:
    """Heat map of what a run's policy keeps: components by scenario, uint8 [height, width, 3]."""
    names, rows = record["results"]["components"], record["results"]["rows"]
    kept = _kept(rows, names)
    figure = Drawing(figsize=(min(40.0, max(8.0, 0.16 * len(names))), 1.6 + 0.3 * len(rows)), dpi=100)
    figure.set_layout_engine("constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        positions, labels = _of_kind(names, kind)
        axes.imshow(kept[:, positions], aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{_TITLES[kind]}: kept (light) or dropped (dark)", fontsize=10)
        layers = _first_of_layers(labels)
        axes.set_xticks([labels.index(label) for label in layers], layers.values())
        axes.set_xlabel("layer")
        axes.set_yticks([])
    scenarios = [f"{row['batch_size']} x {row['prompt_tokens']}, {row['budget_ratio']:.0%}" for row in rows]
    figure.axes[0].set_yticks(range(len(rows)), scenarios, fontsize=8)
    figure.axes[0].set_ylabel("sequences x prompt tokens, memory budget")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def attention_share(comparison: Comparison) -> PageFigure:
    """The attentions' share of what is dropped, at each workload."""
    of_workload, figure = workloads(comparison), Figure()
    of_kind = [_of_kind(comparison.components, kind)[0] for kind in KINDS]
    for agent in comparison.agents:
        dropped = 1 - _keeping(comparison, agent)
        shares = []
        for chosen in of_workload.values():
            attention, mlp = (float(dropped[np.ix_(chosen, positions)].mean()) for positions in of_kind)
            shares.append(attention / (attention + mlp) if attention + mlp else None)
        if any(share is not None for share in shares):
            figure.add_trace(Scatter(x=list(of_workload), y=shares, mode="lines+markers", **style(comparison, agent)))
    figure.add_hline(y=0.5, line=GUIDE)
    figure.update_yaxes(title="attentions among what is dropped", range=[-0.05, 1.05], tickformat=".0%")
    figure.update_layout(height=420)
    caption = (
        "The flip: with few tokens the bytes lie in the MLPs' weights, with many in the KV cache that only attentions"
        " fill. What pays to drop moves from MLPs to attentions; lines that rise to the right follow it. Each kind"
        " counts by the part of its own components that is dropped: halfway both lose the same part."
    )
    return PageFigure("attention_share", "What is dropped at each workload", caption, figure)


def kept_figures(comparison: Comparison) -> list[PageFigure]:
    """A heat map for each agent that drops anything."""
    agents = [agent for agent in comparison.agents if _keeping(comparison, agent).min() < 1]
    return [_kept_figure(comparison, agent) for agent in agents]


def _kept_figure(comparison: Comparison, agent: str) -> PageFigure:
    of_workload, keeping = workloads(comparison), _keeping(comparison, agent)
    titles = [f"{workload}<br>{_TITLES[kind]}" for kind in KINDS for workload in of_workload]
    figure = make_subplots(2, len(of_workload), subplot_titles=titles, horizontal_spacing=0.02, vertical_spacing=0.24)
    for row, kind in enumerate(KINDS, 1):
        positions, layers = _of_kind(comparison.components, kind)
        ticks = _first_of_layers(layers)
        for column, chosen in enumerate(of_workload.values(), 1):
            budgets = [f"{comparison.scenarios[position][1]:.0%}" for position in chosen]
            share = keeping[np.ix_(chosen, positions)]
            labels = [f"{budget}: {kept.sum():.0f} kept" for budget, kept in zip(budgets, share, strict=True)]
            gap = int(len(layers) <= 100)  # more columns are narrower than a gap
            trace = Heatmap(z=share.tolist(), x=layers, y=budgets, coloraxis="coloraxis", xgap=gap, ygap=1)
            trace.customdata = [[label] * len(layers) for label in labels]
            trace.hovertemplate = "layer %{x}, budget %{customdata}<br>kept by %{z:.0%} of seeds<extra></extra>"
            figure.add_trace(trace, row, column)
            figure.update_xaxes(tickvals=list(ticks), ticktext=list(ticks.values()), row=row, col=column)
            figure.update_yaxes(showticklabels=column == 1, autorange="reversed", row=row, col=column)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title="layer", row=2)
    bar = {"title": "of seeds", "tickformat": ".0%"}
    figure.update_layout(height=400, coloraxis={"colorscale": _SHADES, "cmin": 0, "cmax": 1, "colorbar": bar})
    figure.update_annotations(font_size=12)
    caption = "Dark components are kept at that budget, light ones dropped; shades between are seeds that differ."
    return PageFigure(f"kept_{agent}", f"What {agent} keeps", caption, figure)


def _of_kind(components: Sequence[str], kind: str) -> tuple[list[int], list[str]]:
    """Positions of a kind's components, and their names without the kind: `3`, or `3.5` for part 5 of layer 3."""
    positions = [position for position, name in enumerate(components) if name.split(".")[1] == kind]
    return positions, [components[position].replace(f".{kind}", "").removeprefix("layer") for position in positions]


def _first_of_layers(labels: Sequence[str]) -> dict[str, str]:
    """Where an axis over components has its ticks: the first component of about eight layers, with its layer."""
    first: dict[str, str] = {}
    for label in labels:
        first.setdefault(label.partition(".")[0], label)
    step = -(-len(first) // 8)
    return {label: layer for layer, label in list(first.items())[::step]}


def _kept(rows: Sequence[Mapping[str, Any]], components: Sequence[str]) -> np.ndarray:
    """1 where a component is kept, [scenarios, components]."""
    dropped = [set(row["dropped"]) for row in rows]
    return np.array([[name not in of_row for name in components] for of_row in dropped], dtype=float)


def _keeping(comparison: Comparison, agent: str) -> np.ndarray:
    """Share of the seeds that keep a component, [scenarios, components]."""
    return np.mean([_kept(run["rows"], comparison.components) for run in comparison.runs(agent)], axis=0)
