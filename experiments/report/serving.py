"""Replays of a request trace under a memory limit that moves: the table over systems, and memory over time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.table import Table

_MB = 1e6
_COLOURS = {"limit": "#b3261e", "predicted": "#e0a030", "measured": "#27566b"}


def serving_table(record: Mapping[str, Any]) -> Table:
    """Who was served, how well and how fast; a row for each system, the best goodput first.

    Scores of further evaluations are those of the masks that were used, by the tokens that each generated.
    """
    dense = record["results"].get("dense_scores", {})
    columns = [
        *("system", "served", "refused", "lost", "killed", "loss over dense", "weights kept", "tokens/s", "goodput"),
        *("first token s p50", "p95", "p99", "ms a token p50", "p95", "p99"),
        *(f"{name} (dense {score:.3f})" for name, score in dense.items()),
    ]
    rows = []
    for name, each in _best_first(record):
        first, later = each["first_token_seconds"], each["token_seconds"]
        rows.append(
            [
                name,
                *(str(each[key]) for key in ("served", "refused", "lost")),
                "yes" if each["killed"] else "no",
                *(_or_dash(each[key], "{:.3f}") for key in ("loss_over_dense", "kept_ratio")),
                *(f"{each[key]:.1f}" for key in ("tokens_per_second", "goodput")),
                *(_or_dash(first and first[p], "{:.2f}") for p in ("p50", "p95", "p99")),
                *(_or_dash(later and 1000 * later[p], "{:.0f}") for p in ("p50", "p95", "p99")),
                *(_or_dash(each["scores"].get(evaluation), "{:.3f}") for evaluation in dense),
            ]
        )
    return Table(columns, rows)


def serving_memory_table(record: Mapping[str, Any]) -> Table:
    """How memory was kept to, and what switching took; in the same order."""
    columns = [
        *("system", "most used of the limit", "peak of what was predicted", "switches", "chatter", "evictions"),
        *("MB moved", "ms a switch p50", "p95", "time deciding", "time switching"),
    ]
    rows = []
    for name, each in _best_first(record):
        switch = each.get("switch_seconds")
        peak = each.get("most_needed_bytes") and each["peak_bytes"] / each["most_needed_bytes"]
        rows.append(
            [
                name,
                f"{_most_used(each):.0%}",
                _or_dash(peak, "{:.1%}"),
                *(_or_dash(each.get(key), "{}") for key in ("switches", "chatter", "evictions")),
                _or_dash(("moved_bytes" in each and each["moved_bytes"] / _MB) or None, "{:,.0f}"),
                *(_or_dash(switch and 1000 * switch[p], "{:.1f}") for p in ("p50", "p95")),
                *(_or_dash(each.get(key), "{:.2%}") for key in ("decide_share", "switch_share")),
            ]
        )
    return Table(columns, rows)


SERVING_TABLES = {"serving": serving_table, "serving_memory": serving_memory_table}


def _best_first(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(record["results"]["systems"].items(), key=lambda item: -item[1]["goodput"])


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _most_used(system: Mapping[str, Any]) -> float:
    """The most that was used of the limit in force."""
    watched = system["watchdog"]
    return float((np.array(watched["used_bytes"]) / np.maximum(1, watched["limit_bytes"])).max(initial=0.0))


def serving_picture(record: Mapping[str, Any], path: Path) -> Path:
    """Draws memory over time for each system: the limit, what the memory model predicts, and what was measured."""
    systems = record["results"]["systems"]
    figure = Figure(figsize=(9, 1.0 + 2.1 * len(systems)), dpi=100)
    figure.set_layout_engine("constrained")
    canvas = FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(len(systems), 1, sharex=True, sharey=True))
    for axes, (name, each) in zip(panels, systems.items(), strict=True):
        watched = each["watchdog"]
        seconds = watched["seconds"]
        axes.step(seconds, np.array(watched["limit_bytes"]) / _MB, where="post", color=_COLOURS["limit"], label="limit")
        axes.fill_between(seconds, np.array(watched["used_bytes"]) / _MB, color=_COLOURS["measured"], alpha=0.35, lw=0)
        axes.plot(seconds, np.array(watched["used_bytes"]) / _MB, color=_COLOURS["measured"], lw=1, label="measured")
        if "steps" in each:
            steps = each["steps"]
            needed = (np.array(steps["needed_bytes"]) + each["activation_bytes"]) / _MB
            axes.plot(steps["began_seconds"], needed, color=_COLOURS["predicted"], lw=1, label="predicted")
        end = "" if not each["killed"] else f", killed after {seconds[-1] if seconds else 0:.0f} s"
        axes.set_title(f"{name}: {each['served']} of {each['asked']} served{end}", fontsize=10, loc="left")
        axes.set_ylabel("MB")
    panels[0].legend(loc="upper right", fontsize=8, ncols=3)
    panels[0].set_ylim(bottom=0)
    panels[-1].set_xlabel("seconds")
    canvas.print_png(path)
    return path
