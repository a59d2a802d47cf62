"""What the trained reranker finds, beside rivals that need no training."""

from collections.abc import Mapping
from typing import Any

from experiments.report.table import Table


def rerank_training_table(record: Mapping[str, Any]) -> Table:
    """One row a system, the best first; in brackets 95% paired bootstrap intervals over queries."""
    rows = []
    for name, each in sorted(record["results"]["systems"].items(), key=lambda item: -item[1]["ndcg_at_10"]):
        low, high = each["interval"]
        weight = record["results"]["weights_of_the_second"].get(name)
        label = name if weight is None else f"{name}, {weight:.1f} of the second"
        rows.append([label, f"{each['ndcg_at_10']:.3f}", f"{each['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"])
    return Table(["system", "NDCG@10", "minus BM25"], rows)


def rerank_teachers_table(record: Mapping[str, Any]) -> Table:
    """The best weights of each choice of signals, the best choice first; intervals as above."""
    best: dict[frozenset[str], Mapping[str, Any]] = {}
    for row in record["results"]["sums"]:  # the best first
        best.setdefault(frozenset(name for name, weight in row["weights"].items() if weight), row)
    rows = []
    for row in best.values():
        low, high = row["interval"]
        label = " + ".join(f"{weight:.1f} {name}" for name, weight in row["weights"].items() if weight)
        rows.append([label, f"{row['ndcg_at_10']:.3f}", f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"])
    return Table(["teacher", "NDCG@10", "minus likelihood"], rows)
