"""Online calibration of the cluster rule against a walk over thresholds, on recorded score paths.

`python -m experiments.selection_calibration PATHS.npz RECORD.json`. The queries that are not reported come one after
another, in several orders and from several first thresholds, and the online rule (GRATING, `rap_env.rerank.calibrate`)
moves its threshold after each. The walk sees all of them at once. Both thresholds then decide on the reported queries.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.progress import phase
from experiments.records import provenance, write_record
from experiments.rerank_training.data import split_queries
from experiments.reranking.thresholds import lowest_threshold
from experiments.selection_matching import outcomes
from rap_env.rerank import ClusterRule, calibrate
from rap_env.rerank.paths import ScorePaths


def compare(
    tuning: ScorePaths, report: ScorePaths, rule: ClusterRule, target: float, starts: Sequence[float], n_orders: int
) -> list[dict[str, Any]]:
    """A row for the walk and for each first threshold, with the outcome of each order, for K of 1, 5 and 10.

    Args:
        tuning: Queries that thresholds are chosen on.
        report: Queries that they decide on.
        rule: With any threshold.
        target: Mean agreement with the full model's best K.
        starts: First thresholds of the online rule.
        n_orders: Orders in which it sees the queries, drawn from the seeds 0, 1, ...
    """
    rows = []
    orders = [np.random.default_rng(seed).permutation(len(tuning.queries)) for seed in range(n_orders)]
    asked = [(k, start) for k in (1, 5, 10) for start in (None, *starts)]
    with phase("calibrating") as progress:
        for done, (k, start) in enumerate(asked):
            progress(done, len(asked))
            if start is None:
                found = [lowest_threshold(rule, tuning.scores, k, target)]
            else:
                first = replace(rule, threshold=start)
                calibrated = [calibrate(first, [tuning.scores[i] for i in order], k, target) for order in orders]
                found = [one.threshold for one in calibrated]
            of_report = outcomes(report, [replace(rule, threshold=threshold) for threshold in found], k)
            of_each = {name: values.mean(axis=1).tolist() for name, values in vars(of_report).items()}
            rows.append({"top_k": k, "start": start, "thresholds": found, "report": of_each})
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as a Markdown table, with ranges over the orders."""
    text = ["| K | threshold from | it ends at | agreement | compute |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        who = "the walk" if row["start"] is None else f"online, from {row['start']:g}"
        columns = row["thresholds"], row["report"]["agreement"], row["report"]["compute"]
        text.append(f"| {row['top_k']} | {who} | {' | '.join(map(_range, columns))} |")
    return text


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, compares, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, help=".npz file of score paths")
    parser.add_argument("record", type=Path, help="JSON file to write; it must not exist")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--report-share", type=float, default=0.3334, help="of the queries")
    parser.add_argument("--target", type=float, default=0.992, help="mean agreement with the full model's best K")
    parser.add_argument("--first-layer", type=int, default=0, help="after which anybody may leave")
    parser.add_argument("--starts", type=float, nargs="+", default=[0.1, 1.0, 10.0], help="first thresholds")
    parser.add_argument("--orders", type=int, default=5, help="of the queries")
    options = parser.parse_args(arguments)
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    paths = ScorePaths.load(options.paths)
    split = split_queries(paths.queries, 0, round(options.report_share * len(paths.queries)), options.split_seed)
    origin = provenance()
    rule = ClusterRule(1.0, first_layer=options.first_layer)
    parts = paths.part(split.training), paths.part(split.report)
    rows = compare(*parts, rule, options.target, options.starts, options.orders)
    digest = hashlib.sha256(options.paths.read_bytes()).hexdigest()
    source = {"file": options.paths.name, "sha256": digest, "provenance": dict(paths.provenance)}
    settings = {name: value for name, value in vars(options).items() if name not in ("paths", "record")}
    config = settings | {"paths": source, "queries": [len(part.queries) for part in parts]}
    print("\n".join(lines(rows)))
    write_record(options.record, {"config": config, "provenance": origin, "results": {"rows": rows}})


if __name__ == "__main__":
    main()
