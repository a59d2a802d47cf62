"""Options of scripts, which may be given as Hydra's are, `name=value`; what a script measured, as a record."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.records import provenance, write_record


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Options that were given as `--name value`, `--name=value` or `name=value`."""
    return parser.parse_args([given if given.startswith("-") else f"--{given}" for given in arguments])


def write_results(options: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Writes a record where the option `record` says so."""
    if options.record:
        write_record(options.record, {"config": vars(options), "provenance": provenance(), "results": results})
