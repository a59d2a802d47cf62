"""Bytes against quality of several ways to make a model smaller: `experiment=frontier`'s table and picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from plotly.colors import qualitative
from plotly.graph_objects import Scatter
from plotly.subplots import make_subplots

from experiments.report.comparison import SEARCH, workload_name
from experiments.report.drawing import PageFigure, page_of_one
from experiments.report.table import Table

BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)  # of the bytes of the model as it was loaded, all kept
_BLOCKS, _GROUPS = "whole sites", "parts"
_REFERENCE = _BLOCKS
_MOST_DRAWN = 2.5  # nats: beyond, no model is of use


@dataclass(frozen=True)
class Point:
    """A mask at a workload.

    Attributes:
        share: Its bytes, of those of the whole model in full precision.
        search_score: Chooses among masks that fit.
        loss: Report loss minus that of the whole model in full precision.
    """

    share: float
    search_score: float
    loss: float


Workloads = dict[str, list[Point]]  # points by workload


class Frontier:
    """Records that differ in how the model was made smaller, read together.

    Args:
        records: One for each way; one of them of whole sites in full precision, which the others are relative to.

    Attributes:
        points: By way and workload, the whole model's first.
        unpruned: Formats without any pruning, the same way.

    Raises:
        ValueError: Two records are of one way, the reference is missing, or a workload is not in all of them.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        named = {way_of(record): record["results"] for record in records}
        if len(named) < len(records):
            raise ValueError("expected one record for each way to make the model smaller; there are two of one")
        if _REFERENCE not in named:
            raise ValueError(f"expected a record of {_REFERENCE!r} among them; got {', '.join(named)}")
        self.points = {way: _points(results, named[_REFERENCE]) for way, results in sorted(named.items(), key=_rank)}
        self.unpruned = _unpruned(self.points)
        if len({tuple(sorted(of_way)) for of_way in self.points.values()}) > 1:
            raise ValueError("expected records of the same workloads; they differ")

    def best(self, way: str, budget: float) -> float:
        """Mean loss over the workloads of the whole model or else the best mask that fits, by the search's score.

        NaN where nothing fits at a workload.

        Args:
            way: One of `points` or `unpruned`.
            budget: Share of the bytes of the whole model in full precision.
        """
        losses = []
        for points in (self.unpruned | self.points)[way].values():
            whole, fitting = points[0], [point for point in points if point.share <= budget]
            if whole in fitting:
                losses.append(whole.loss)  # with room for everything, everything is kept
            else:
                losses.append(max(fitting, key=lambda point: point.search_score).loss if fitting else np.nan)
        return float(np.mean(losses))


def way_of(record: Mapping[str, Any]) -> str:
    """What a record's model was made smaller by, in words."""
    model, widths = record["config"]["model"], record["config"]["widths"]
    parts = [_BLOCKS if model["granularity"] == "block" else _GROUPS]
    parts += [widths["compensation"]] * (widths["compensation"] != "none" and model["granularity"] != "block")
    parts += [model["weights"].upper()] * (model["weights"] != "full")
    parts += [f"{model['kv_cache'].upper()} KV"] * (model["kv_cache"] != "full")
    return ", ".join(parts)


def _rank(item: tuple[str, Any]) -> tuple[int, str]:
    return item[0].count(","), item[0] != _REFERENCE, item[0]


def _points(results: Mapping[str, Any], reference: Mapping[str, Any]) -> Workloads:
    """By workload, the whole model first."""
    main, dense_loss = reference["evaluators"][0], -reference["dense"][reference["evaluators"][0]]
    full_bytes = {workload_name(row): row["footprint"]["peak_bytes"] for row in reference["references"]["dense"]}
    points: Workloads = {}
    for row in [*results["references"]["dense"], *results["rows"]]:
        own, name = points.setdefault(workload_name(row), []), workload_name(row)
        share = row["footprint"]["peak_bytes"] / full_bytes[name]
        point = Point(share, row[SEARCH]["score"], -row["reports"][main]["score"] - dense_loss)
        if point not in own:
            own.append(point)
    return points


def _unpruned(points: Mapping[str, Workloads]) -> dict[str, Workloads]:
    """The whole models' points of other number formats; of two records of one format those of the first."""
    found: dict[str, Workloads] = {}
    for way, of_way in points.items():
        formats = [part for part in way.split(", ") if part.startswith("INT")]
        if formats:
            found.setdefault(f"{', '.join(formats)} alone", {name: of[:1] for name, of in of_way.items()})
    return found


def frontier_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Mean loss over the full-precision model at budgets: a row for each way, the best of each budget in bold."""
    frontier = Frontier(records)
    ways = [*frontier.unpruned, *frontier.points]
    losses = np.array([[frontier.best(way, budget) for budget in BUDGETS] for way in ways])
    best = np.nanmin(np.where(np.isnan(losses), np.inf, losses), axis=0)

    def cell(loss: float, least: float) -> str:
        text = "-" if np.isnan(loss) else f"{loss:.3f}"
        return f"**{text}**" if loss == least else text

    rows = [[way, *map(cell, of_way, best)] for way, of_way in zip(ways, losses, strict=True)]
    return Table(["", *(f"{budget:.0%}" for budget in BUDGETS)], rows)


def frontier_figure(records: Sequence[Mapping[str, Any]]) -> PageFigure:
    """Loss against bytes, a panel for each workload and a line for each way."""
    frontier = Frontier(records)
    names = list(next(iter(frontier.points.values())))
    figure = make_subplots(1, len(names), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.02)
    for number, (way, of_way) in enumerate(frontier.points.items()):
        colour = qualitative.Dark24[number % len(qualitative.Dark24)]
        for column, name in enumerate(names, 1):
            points = sorted(of_way[name], key=lambda point: point.share)
            figure.add_trace(
                Scatter(
                    x=[100 * point.share for point in points],
                    y=[point.loss for point in points],
                    name=way,
                    legendgroup=way,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": colour, "dash": "solid" if "INT" not in way else "dot"},
                ),
                1,
                column,
            )
    figure.update_xaxes(title="bytes, % of dense in full precision")
    figure.update_yaxes(range=[-0.1, _MOST_DRAWN])
    figure.update_yaxes(title="report loss over dense in full precision (nats)", col=1)
    figure.update_layout(height=520)
    caption = (
        "Each way's masks, from the whole model (right) to half of its own bytes. Lower and further left is better;"
        f" losses above {_MOST_DRAWN} are left out."
    )
    return PageFigure("frontier", "Bytes against quality", caption, figure)


def frontier_page(records: Sequence[Mapping[str, Any]]) -> str:
    """A page with the picture; one file that loads nothing."""
    return page_of_one(frontier_figure(records))
