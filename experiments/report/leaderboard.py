"""The leaderboard of a context family: ranking and anytime curves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from plotly.graph_objects import Figure

from experiments.report.amortisation import within_ranges
from experiments.report.comparison import distinct
from experiments.report.drawing import PageFigure, spread_line
from experiments.report.metrics import SPREAD, plain_mean, with_spread
from experiments.report.table import Table, number


def is_leaderboard(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are rows of a leaderboard instead of runs."""
    return bool(records) and all("tuned_on" in record["results"] for record in records)


def leaderboard_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The least loss on held-out contexts first; of equal ones who spent less."""
    ranked = sorted(rows, key=lambda row: (_spread(row, held_out=True)[0], _tokens(row)))
    cells = [
        [
            str(place),
            row["results"]["agent"],
            _distinct(row)[1],
            f"{_tokens(row):.0f}",
            number(*_spread(row, held_out=True)),
            number(*_spread(row, held_out=False)),
            row["results"]["tuned_on"].replace("|", "/"),
            str(row["results"]["tuning_tokens"]),
        ]
        for place, row in enumerate(ranked, 1)
    ]
    columns = ["", "agent", "seeds", "tokens", "held-out loss over dense", "outside, loss over dense"]
    return Table([*columns, "tuned on", "tuning tokens"], cells)


def leaderboard_figure(rows: Sequence[Mapping[str, Any]]) -> PageFigure:
    """Loss on held-out contexts against tokens; a line joins an agent's rows."""
    figure = Figure()
    for place, (agent, of_agent) in enumerate(_by_agent(rows)):
        spreads = [_spread(row, True) for row in of_agent]
        figure.add_trace(spread_line(agent, place, [_tokens(row) for row in of_agent], spreads))
    figure.update_xaxes(title="tokens spent", type="log")
    figure.update_yaxes(title="held-out loss over dense (nats)", rangemode="tozero")
    figure.update_layout(height=520, showlegend=True)
    caption = (
        "What an agent loses on held-out contexts after so many forwarded tokens, mean over contexts and seeds, bars"
        f" {SPREAD}. Each point is a row of the leaderboard, a run under a token budget of its own; a line joins those"
        " of one agent. Tokens for tuning come on top."
    )
    return PageFigure("leaderboard", "Held-out loss against tokens", caption, figure)


def _by_agent(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for agent in sorted({row["results"]["agent"] for row in rows}):
        yield agent, sorted((row for row in rows if row["results"]["agent"] == agent), key=_tokens)


def _distinct(row: Mapping[str, Any]) -> tuple[list[tuple[float, Any]], str]:
    """(dense loss, contexts) of each seed, and their number as a table shows it."""
    results = row["results"]
    of_seeds = list(zip(results["dense_loss"], results["contexts"], strict=True))
    return distinct(of_seeds, lambda of_seed: of_seed)


def _spread(row: Mapping[str, Any], held_out: bool) -> tuple[float, float, float]:
    """Mean loss over dense with both ends of its spread; NaN where there is no such context."""
    of_seeds, _n_seeds = _distinct(row)
    chosen = within_ranges(row["config"]["workload"]["sampler"], of_seeds[0][1]) == held_out
    if not chosen.any():
        return (np.nan,) * 3
    costs = np.array([[context["loss"] - dense for context in contexts] for dense, contexts in of_seeds])
    return tuple(float(end) for end in with_spread(costs[:, chosen], plain_mean))


def _tokens(row: Mapping[str, Any]) -> float:
    return float(np.mean(row["results"]["tokens"]))
