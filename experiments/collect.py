"""A table of records, one a line: `python -m experiments.collect outputs/compare/NAME results/NAME.jsonl`."""

import argparse
import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.records import COMPRESSED, read_records
from rap_env.errors import InvalidConfig, RapError
from rap_env.files import write_over


def write_table(path: Path, records: Sequence[Mapping[str, Any]], mixed: bool = False) -> Path:
    """Writes records as JSON lines, in place of an older table.

    Args:
        path: The file, compressed if it is named `.jsonl.gz`; its folder is made if missing.
        records: At least one.
        mixed: Whether they may be of several commits, or of code that no commit has.

    Raises:
        InvalidConfig: There is no record, or they are mixed and may not be.
    """
    if not records:
        raise InvalidConfig(f"{path}: expected at least one record; got none")
    states = {json.dumps(record["provenance"].get("git"), sort_keys=True) for record in records}
    if not mixed and (len(states) > 1 or (json.loads(*states) or {"dirty": True})["dirty"]):
        raise InvalidConfig(
            f"{path}: expected records of one commit without changes; got {', '.join(sorted(states))}."
            " Run the others again, or say --mixed"
        )
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")) for record in records]
    content = "".join(line + "\n" for line in lines).encode()
    return write_over(path, gzip.compress(content, mtime=0) if path.name.endswith(COMPRESSED) else content)


def main(arguments: Sequence[str]) -> None:
    description = "Writes the records of runs into one table, a record a line, for the reports and the documentation."
    parser = argparse.ArgumentParser(prog="python -m experiments.collect", description=description)
    parser.add_argument("records", type=Path, nargs="+", metavar="PATH", help="a sweep's or run's folder, or a record")
    parser.add_argument(
        "table",
        type=Path,
        metavar="TABLE.jsonl",
        help="is written in place of an older one; compressed if it ends in .jsonl.gz",
    )
    parser.add_argument(
        "--mixed", action="store_true", help="take records of several commits, or of code that was not committed"
    )
    options = parser.parse_args(arguments)
    try:
        records = [record for path in options.records for record in read_records(path)]
        print(f"{len(records)} records: {write_table(options.table, records, options.mixed)}")
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
