"""Online calibration of the cluster rule against a walk over thresholds, on recorded score paths.

`python -m experiments.selection_calibration PATHS.npz RECORD.json`. The queries that are not reported come one after
another, in several orders and from several first thresholds, and the online rule (GRATING, `rap_env.rerank.calibrate`)
moves its threshold after each. The walk sees all of them at once. Both thresholds then decide on the reported queries.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.progress import phase
from experiments.records import provenance, write_record
from experiments.report.selection import selection_calibration_table
from experiments.reranking.thresholds import lowest_threshold
from experiments.selection_matching import outcomes
from experiments.selection_split import add_split_options, read_split
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, compares, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_split_options(parser)
    parser.add_argument("--first-layer", type=int, default=0, help="after which anybody may leave")
    parser.add_argument("--starts", type=float, nargs="+", default=[0.1, 1.0, 10.0], help="first thresholds")
    parser.add_argument("--orders", type=int, default=5, help="of the queries")
    options = parser.parse_args(arguments)
    paths, split, config = read_split(parser, options)
    origin = provenance()
    rule = ClusterRule(1.0, first_layer=options.first_layer)
    parts = paths.part(split.training), paths.part(split.report)
    rows = compare(*parts, rule, options.target, options.starts, options.orders)
    config |= {name: getattr(options, name) for name in ("first_layer", "starts", "orders")}
    record = {"config": config, "provenance": origin, "results": {"rows": rows}}
    print("\n".join(selection_calibration_table(record).markdown))
    write_record(options.record, record)


if __name__ == "__main__":
    main()
