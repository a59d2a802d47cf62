"""Rerankers compared: the table over systems, their latency against memory, and agreement layer by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.table import Table

_MB = 1e6
_BASE = "hf"  # what ratios are taken to, or the first system where it was not run
_COLOURS = {"line": "#27566b", "band": "#9dc0cf"}
_MARKERS = "osD^vPX*<>hpd"


def reranking_table(record: Mapping[str, Any]) -> Table:
    """A row for each system, number of candidates and K, in the order in which the systems were named."""
    columns = [
        *("candidates", "K", "system", "s", "of hf", "peak MB", "of hf", "layers", "MB read"),
        *("agreement", "precision"),
    ]
    rows = []
    for candidates, k in _settings(record):
        base = _base(record, candidates, k)
        for name, row in _rows(record, candidates, k).items():
            read = row["read_bytes"]
            cells = [
                *(str(candidates), str(k), name),
                *(f"{row['seconds']:.2f}", f"{row['seconds'] / base['seconds']:.0%}"),
                *(f"{row['peak_bytes'] / _MB:.0f}", f"{row['peak_bytes'] / max(1, base['peak_bytes']):.0%}"),
                *(f"{row['layers']:.1f}", "-" if not read else f"{read / _MB:.0f}"),
                *(f"{row['agreement']:.3f}", f"{row['precision']:.3f}"),
            ]
            rows.append(cells)
    return Table(columns, rows)


def found_table(record: Mapping[str, Any]) -> Table:
    """NDCG@10 of BM25's order, which all systems start from, and of the systems that rank all documents."""
    rows = [[str(each["candidates"]), "bm25", f"{each['ndcg_at_10']:.3f}"] for each in record["results"]["bm25"]]
    for name, settings in record["results"]["systems"].items():
        known = {row["candidates"]: row["ndcg_at_10"] for row in settings if row["ndcg_at_10"] is not None}
        rows += [[str(candidates), name, f"{value:.3f}"] for candidates, value in known.items()]
    return Table(["candidates", "system", "NDCG@10"], sorted(rows, key=lambda row: (int(row[0]), -float(row[2]))))


RERANKING_TABLES = {"reranking": reranking_table, "reranking_found": found_table}


def _settings(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    found = {(row["candidates"], row["top_k"]) for rows in record["results"]["systems"].values() for row in rows}
    return sorted(found)


def _rows(record: Mapping[str, Any], candidates: int, k: int) -> dict[str, Mapping[str, Any]]:
    return {
        name: row
        for name, rows in record["results"]["systems"].items()
        for row in rows
        if (row["candidates"], row["top_k"]) == (candidates, k)
    }


def _base(record: Mapping[str, Any], candidates: int, k: int) -> Mapping[str, Any]:
    rows = _rows(record, candidates, k)
    return rows.get(_BASE) or next(iter(rows.values()))


def trade_off_picture(record: Mapping[str, Any], path: Path) -> Path:
    """Draws seconds against peak memory: a panel for each number of candidates and K, a point for each system."""
    settings = _settings(record)
    sizes = sorted({candidates for candidates, _k in settings})
    ks = sorted({k for _candidates, k in settings})
    figure, canvas = _figure(3.8 * len(ks) + 1.6, 3.4 * len(sizes))
    panels = figure.subplots(len(sizes), len(ks), squeeze=False)
    for candidates, k in settings:
        axes = panels[sizes.index(candidates)][ks.index(k)]
        for number, name in enumerate(record["results"]["systems"]):
            row = _rows(record, candidates, k).get(name)
            if row is not None:
                look = {"color": f"C{number}", "marker": _MARKERS[number % len(_MARKERS)], "ls": "none", "label": name}
                axes.plot(row["seconds"], row["peak_bytes"] / _MB, ms=6, **look)
        axes.set_title(f"best {k} of {candidates}", fontsize=10, loc="left")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds a request")
        axes.set_ylabel("peak memory, MB")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    canvas.print_png(path)
    return path


def gamma_picture(record: Mapping[str, Any], path: Path) -> Path:
    """Draws Goodman and Kruskal's gamma between each layer's scores and the last one's: mean and range of requests."""
    gammas = np.array(record["results"]["gamma"], dtype=float)  # [requests, layers]; no number where all are equal
    layers = np.arange(1, gammas.shape[1] + 1)
    figure, canvas = _figure(6.5, 3.6)
    axes = figure.subplots()
    axes.fill_between(layers, np.nanmin(gammas, 0), np.nanmax(gammas, 0), color=_COLOURS["band"], alpha=0.6, lw=0)
    axes.plot(layers, np.nanmean(gammas, 0), color=_COLOURS["line"], lw=1.5)
    axes.axhline(0, color="#888", lw=0.8, ls=":")
    axes.set_xlabel("layers read")
    axes.set_ylabel("gamma to the last layer's order")
    axes.set_ylim(top=1.02)
    canvas.print_png(path)
    return path


def _figure(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(width, height), dpi=100)
    figure.set_layout_engine("constrained")
    return figure, FigureCanvasAgg(figure)
