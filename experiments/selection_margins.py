"""The margins by layer that ship with an adapter: `python -m experiments.selection_margins PATHS RECORD MARGINS.json`.

Noise of each layer and one margin come from the queries that are not reported: the widest of the margins that some
numbers of candidates and K of 1, 5 and 10 need for the target agreement. The rule then decides on those that are.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records import provenance, write_record
from experiments.report.selection import selection_margins_table
from experiments.reranking.thresholds import lowest_margins
from experiments.selection_matching import outcomes
from experiments.selection_split import add_split_options, read_split
from rap_env.envs.selection import TOP_KS
from rap_env.files import write_over
from rap_env.rerank import MarginRule
from rap_env.rerank.margins import score_noise
from rap_env.rerank.paths import ScorePaths


def margins_of(tuning: ScorePaths, report: ScorePaths, sizes: Sequence[int], target: float) -> dict[str, Any]:
    """The rule, and a row for each number of candidates and K: the margin that is needed, and what the rule came to.

    Args:
        tuning: Queries that noise and margin are of.
        report: Queries that the rule decides on.
        sizes: Numbers of candidates.
        target: Mean agreement with the full model's best K.
    """
    noise = score_noise(tuning.scores)
    needed = lowest_margins(noise, tuning.scores, sizes, TOP_KS, target)
    rule = MarginRule(tuple(noise.tolist()), max(needed.values()))
    rows = [{"candidates": size, "top_k": k, "needed": margin} for (size, k), margin in needed.items()]
    for row in rows:
        row["report"] = outcomes(report.first(row["candidates"]), [rule], row["top_k"]).means()
    # JSON has no infinity.
    return {"rows": rows, "margin": rule.margin, "noise": [each if np.isfinite(each) else None for each in rule.noise]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, makes the rule, prints, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_split_options(parser)
    parser.add_argument("margins", type=Path, help="JSON file for `MarginRule.load`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 60], help="numbers of candidates")
    options = parser.parse_args(arguments)
    paths, split, config = read_split(parser, options)
    origin = provenance()
    results = margins_of(paths.part(split.training), paths.part(split.report), options.sizes, options.target)
    record = {"config": config | {"sizes": options.sizes}, "provenance": origin, "results": results}
    print("\n".join(selection_margins_table(record).markdown))
    write_record(options.record, record)
    rule = {name: results[name] for name in ("margin", "noise")}
    write_over(options.margins, json.dumps(rule | {"model_digest": paths.provenance.get("model_digest")}, indent=1))


if __name__ == "__main__":
    main()
