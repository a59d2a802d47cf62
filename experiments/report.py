"""Tables from stored records: `python -m experiments.report results/main/*.json` prints Markdown."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.records import read_record
from rap_env.errors import RapError

_COLUMNS = ("accuracy", "smooth_accuracy", "reward")


def seed_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown lines: for each policy the mean over records (seeds) and, in brackets, their standard deviation."""
    per_policy = defaultdict(list)
    for record in records:
        for name, means in record["results"]["summary"].items():
            per_policy[name].append(means)
    lines = [
        "| policy | seeds | footprint GB | accuracy | smooth accuracy | reward | violations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in per_policy.items():
        cells = [_with_spread([run[column] for run in runs]) for column in _COLUMNS]
        violations = f"{sum(run['violations'] for run in runs)} of {sum(run['scenarios'] for run in runs)}"
        footprint = f"{mean(run['footprint_gb'] for run in runs):.3f}"
        lines.append("| " + " | ".join([name, str(len(runs)), footprint, *cells, violations]) + " |")
    return lines


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ({stdev(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def main(paths: Sequence[str]) -> None:
    if not paths:
        sys.exit("usage: python -m experiments.report RECORD.json [RECORD.json ...]")
    try:
        print("\n".join(seed_table([read_record(Path(path)) for path in paths])))
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
