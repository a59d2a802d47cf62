"""Checks a leaderboard: `python -m experiments.validate results/leaderboard.jsonl [KEY=VALUE ...]`.

Contexts and bytes of all masks are checked by arithmetic; the losses of a sample of masks are measured again on the
real model. KEY=VALUE says where the texts lie: evaluation.search_paths=[valid.txt] evaluation.report_paths=[test.txt].
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.leaderboard.checks import SAMPLE, SEED, TOLERANCE, check, rebuild
from experiments.leaderboard.rows import check_rows
from experiments.progress import phase
from experiments.records import read_records
from rap_env.errors import RapError


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and the table, checks, and ends with an error if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m experiments.validate", description=__doc__.partition("\n\n")[2])
    parser.add_argument("table", type=Path, help="the leaderboard")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the rows' config")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="masks of each row and seed that are measured again")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw of these masks")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="nats that losses may differ by")
    options = parser.parse_intermixed_args(arguments)
    try:
        rows = read_records(options.table)
        check_rows(rows)
        rebuilt = rebuild(rows[0], options.overrides, options.table)
        if rebuilt.changes:
            print(f"note: the model is not to the last bit that of the rows; changed since: {rebuilt.changes}")
        with phase("validate") as progress:
            checked = check(rows, rebuilt, options.sample, options.seed, options.tolerance, progress)
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{len(rows)} rows: {checked.n_footprints:,} masks held against their budgets; {checked.n_measured:,} losses"
        f" measured again, they differ by at most {checked.largest_difference:.4f} nats ({options.tolerance} allowed)"
    )
    if checked.faults:
        sys.exit("\n".join(f"error: {fault}" for fault in checked.faults))


if __name__ == "__main__":
    main(sys.argv[1:])
