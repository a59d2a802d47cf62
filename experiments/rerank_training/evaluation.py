"""NDCG@10 of rankings, and how sure a difference between two of them is."""

from collections.abc import Iterator, Mapping, Sequence

import ir_measures
import numpy as np

from experiments.rerank_training.rivals import Scores, fused, summed

MEASURE = ir_measures.nDCG @ 10
_WEIGHTS = tuple(step / 10 for step in range(11))
_RESAMPLES = 10_000
_COVERED_PERCENT = 95


def ndcg(grades: Mapping[str, Mapping[str, int]], run: Mapping[str, Scores]) -> dict[str, float]:
    """NDCG@10 of each query in a run, with gains as trec_eval has them: the grades themselves.

    Relevant documents that are not among a query's candidates count as missed.

    Args:
        grades: By query and document.
        run: Scores by query and document.
    """
    judged = {query: dict(grades[query]) for query in run}
    scored = {query: dict(scores) for query, scores in run.items()}
    values = {found.query_id: found.value for found in ir_measures.iter_calc([MEASURE], judged, scored)}
    return {query: values[query] for query in run}


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean difference, from queries drawn again with replacement.

    Args:
        differences: Of the same query under two systems, for each query.
        seed: Of the draws.
    """
    values = np.asarray(differences)
    draws = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    outside = (100 - _COVERED_PERCENT) / 2
    low, high = np.percentile(values[draws].mean(1), [outside, 100 - outside])
    return float(low), float(high)


def best_weight(
    grades: Mapping[str, Mapping[str, int]], first: Mapping[str, Scores], second: Mapping[str, Scores]
) -> float:
    """The second scorer's weight, in tenths, with the highest mean NDCG@10 of the sums; the lowest of equal ones."""

    def mean(weight: float) -> float:
        run = {query: fused(first[query], second[query], weight) for query in first}
        return float(np.mean(list(ndcg(grades, run).values())))

    return max(_WEIGHTS, key=mean)


def compared(
    grades: Mapping[str, Mapping[str, int]], runs: Mapping[str, Mapping[str, Scores]], baseline: str
) -> dict[str, dict]:
    """Rows of a table: mean NDCG@10, its difference to the baseline with interval, and the value of each query.

    Args:
        grades: By query and document.
        runs: By system, all over the same queries.
        baseline: One of the systems.
    """
    values = {system: ndcg(grades, run) for system, run in runs.items()}
    rows = {}
    for system, by_query in values.items():
        differences = [value - values[baseline][query] for query, value in by_query.items()]
        rows[system] = {
            "ndcg_at_10": float(np.mean(list(by_query.values()))),
            "difference": float(np.mean(differences)),
            "interval": bootstrap_interval(differences),
            "by_query": by_query,
        }
    return rows


def compared_sums(
    grades: Mapping[str, Mapping[str, int]], runs: Mapping[str, Mapping[str, Scores]], baseline: str
) -> list[dict]:
    """Sums of standardised scores with all weights in tenths, the best first.

    Args:
        grades: By query and document.
        runs: By system, all over the same queries.
        baseline: One of the systems, for itself.

    Returns:
        For each its weights by system, its mean NDCG@10, and the difference to the baseline with interval.
    """
    names = list(runs)
    sums = {
        weights: {query: summed([runs[name][query] for name in names], weights) for query in runs[baseline]}
        for weights in _tenths(len(names), 10)
    }
    alone = tuple(float(name == baseline) for name in names)
    rows = [
        {"weights": dict(zip(names, weights, strict=True)), **row}
        for weights, row in compared(grades, sums, alone).items()
    ]
    for row in rows:
        del row["by_query"]
    return sorted(rows, key=lambda row: -row["ndcg_at_10"])


def _tenths(n_weights: int, left: int) -> Iterator[tuple[float, ...]]:
    """All weights in tenths that sum to so many of them."""
    if n_weights == 1:
        yield (left / 10,)
        return
    for first in range(left + 1):
        for others in _tenths(n_weights - 1, left - first):
            yield (first / 10, *others)


def lines(rows: Mapping[str, Mapping]) -> list[str]:
    """The table as text."""
    text = [f"{'system':30} NDCG@10  difference to BM25 (95%)"]
    for system, row in rows.items():
        low, high = row["interval"]
        text.append(f"{system:30} {row['ndcg_at_10']:7.4f}  {row['difference']:+.4f} ({low:+.4f}, {high:+.4f})")
    return text
