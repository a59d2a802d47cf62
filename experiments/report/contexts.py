"""Tables of kinds of context: what masks of one lose in another, and how far orders of importance agree.

What is subtracted are losses on the same windows, so errors are of paired differences. Two draws of search text give
two masks of each kind; how much they differ is the noise that a difference between kinds is held against.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from experiments.report.table import Table

BEYOND = 2.0  # standard errors, from which on a difference counts as one
_Z = 1.96  # of a 95% interval


def context_table(record: Mapping[str, Any]) -> Table:
    """Loss over dense of masks of each kind of context in each, mean over draws; and what another kind's mask adds.

    The error holds the windows' and the draws'. An excess of more than two errors is bold.
    """
    results, rows = record["results"], []
    columns = sorted((name for name, of_text in results["dense"].items() if isinstance(of_text, list)), key=_place)
    for selection, of_rows in results["measured"].items():
        for row in sorted(of_rows, key=_place):
            rows.append([selection, row, *(_cell(results, selection, row, column) for column in columns)])
    return Table(["dropped", "found for", *(f"in {column}" for column in columns)], rows)


def _place(name: str) -> tuple[str, int]:
    """Kinds in the order of the alphabet, each from short to long contexts."""
    kind, _, tokens = name.partition(" ")
    return kind, int(tokens)


def _cell(results: Mapping[str, Any], selection: str, row: str, column: str) -> str:
    of_rows = results["measured"][selection]
    losses = {name: _losses(draws, column) for name, draws in of_rows.items()}
    over_dense = (losses[row].mean(axis=0) - np.array(results["dense"][column])).mean()
    if column not in losses:
        return f"{over_dense:.3f}"
    if row == column:
        return f"{over_dense:.3f}, draws {abs(_between_draws(losses[row])):.3f} apart"
    value, error = excess(losses, row, column)
    text = f"{value:+.3f} ± {error:.3f}"
    return f"{over_dense:.3f} ({f'**{text}**' if value > BEYOND * error else text})"


def excess(losses: Mapping[str, np.ndarray], row: str, column: str) -> tuple[float, float]:
    """What the masks of a row lose to those of the column's own kind, and its standard error.

    Args:
        losses: Of the masks of each kind, measured in the column's [draws, windows].
        row: Whose masks.
        column: The kind that they are measured in.
    """
    n_draws, n_windows = losses[row].shape
    of_windows = losses[row].mean(axis=0) - losses[column].mean(axis=0)
    # Each kind has two draws only, so what draws differ by is taken from all rows of the column together.
    of_one_draw = np.mean([np.var(of_kind.mean(axis=1), ddof=1) for of_kind in losses.values()])
    variance = of_windows.var(ddof=1) / n_windows + 2.0 * of_one_draw / n_draws
    return float(of_windows.mean()), math.sqrt(variance)


def mean_table(record: Mapping[str, Any]) -> Table:
    """For each size of masks: what own masks lose to dense, what those of other kinds add, how far draws are apart."""
    results, rows = record["results"], []
    for selection, of_rows in results["measured"].items():
        losses = {row: {column: _losses(draws, column) for column in of_rows} for row, draws in of_rows.items()}
        own = np.mean([losses[name][name].mean() - np.mean(results["dense"][name]) for name in losses])
        apart = np.mean([abs(_between_draws(losses[name][name])) for name in losses])
        value, error = mean_excess(losses)
        rows.append([selection, f"{own:.3f}", f"{value:+.3f} ± {error:.3f}", f"{apart:.3f}"])
    return Table(["dropped", "own masks over dense", "masks of other kinds add", "draws of one kind apart"], rows)


def mean_excess(losses: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """What masks of other kinds lose to a column's own, mean over all pairs of kinds, and its standard error.

    Args:
        losses: By row and column [draws, windows]; every row is a column too.
    """
    n_kinds = len(losses)
    weight = {True: -1.0 / n_kinds, False: 1.0 / (n_kinds * (n_kinds - 1))}  # of own masks, of others
    of_draws = {
        row: sum(weight[row == column] * cell.mean(axis=1) for column, cell in of_row.items())
        for row, of_row in losses.items()
    }
    of_windows: dict[str, np.ndarray] = {}  # by kind of text: contexts of several lengths end in the same windows
    for row, of_row in losses.items():
        for column, cell in of_row.items():
            text, share = column.partition(" ")[0], weight[row == column] * cell.mean(axis=0)
            of_windows[text] = of_windows.get(text, 0.0) + share
    value = sum(of_kind.mean() for of_kind in of_draws.values())
    variance = sum(of_kind.var(ddof=1) / len(of_kind) for of_kind in (*of_draws.values(), *of_windows.values()))
    return float(value), math.sqrt(variance)


def _losses(draws: Sequence[Mapping[str, Any]], column: str) -> np.ndarray:
    return np.array([of_mask[column] for of_mask in draws])


def _between_draws(losses: np.ndarray) -> float:
    return float(losses[0].mean() - losses[1].mean())


def order_table(record: Mapping[str, Any]) -> Table:
    """Kendall's tau between orders of importance: of KV heads, and where they were measured of MLPs' halves.

    Between two draws of one kind, and the mean over pairs of draws of two kinds.
    """
    costs, rows = record["results"]["costs"], []
    parts = [part for part in ("heads", "halves") if next(iter(costs.values()))[0][part]]
    for one, other in itertools.combinations_with_replacement(sorted(costs, key=_place), 2):
        taus = [_mean_tau(costs[one], costs[other], part, same=one == other) for part in parts]
        rows.append([one, "another draw" if one == other else other, *(f"{tau:.2f}" for tau in taus)])
    titles = {"heads": "tau over KV heads", "halves": "tau over halves of MLPs"}
    return Table(["kind of context", "and", *(titles[part] for part in parts)], rows)


def _mean_tau(one: Sequence[Mapping], other: Sequence[Mapping], part: str, same: bool) -> float:
    pairs = itertools.combinations(one, 2) if same else itertools.product(one, other)
    return float(np.mean([_tau(first[part], second[part]) for first, second in pairs]))


def _tau(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return kendalltau([one[name] for name in one], [other[name] for name in one]).statistic


def recall_table(record: Mapping[str, Any]) -> Table:
    """Accuracy of recall by tokens of context: dense with its 95% interval, and masks of both draws."""
    results = record["results"]
    dense = {name: metrics for name, metrics in results["dense"].items() if isinstance(metrics, Mapping)}
    columns = sorted(dense, key=_place)
    rows = [["dense", "", *(_accuracy(dense[column]) for column in columns)]]
    for selection, of_rows in results["measured"].items():
        for row, draws in of_rows.items():
            cells = [
                ", ".join(_shares(of_mask[column]) for of_mask in draws if column in of_mask) for column in columns
            ]
            rows.append([selection, row, *(cell or "-" for cell in cells)])
    return Table(["dropped", "found for", *columns], rows)


def _shares(metrics: Mapping[str, float]) -> str:
    return f"{metrics['acc']:.2f} (smooth {metrics['smooth_acc']:.2f})"


def _accuracy(metrics: Mapping[str, float]) -> str:
    """With Wilson's interval."""
    share, n_items = metrics["acc"], metrics["items"]
    middle = (share + _Z**2 / (2 * n_items)) / (1 + _Z**2 / n_items)
    half = _Z / (1 + _Z**2 / n_items) * math.sqrt(share * (1 - share) / n_items + _Z**2 / (4 * n_items**2))
    return f"{_shares(metrics)} [{middle - half:.2f}, {middle + half:.2f}]"


CONTEXT_TABLES = {
    "contexts": context_table,
    "context_means": mean_table,
    "context_orders": order_table,
    "context_recall": recall_table,
}
