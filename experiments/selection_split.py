"""Recorded queries in parts, by options that the commands over score paths have in common."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from experiments.rerank_training.data import Split, split_queries
from rap_env.rerank.paths import ScorePaths


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `read_split` reads."""
    parser.add_argument("paths", type=Path, help=".npz file of score paths")
    parser.add_argument("record", type=Path, help="JSON file to write; it must not exist")
    parser.add_argument("--candidates", type=int, help="the first ones of each query; all by default")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--report-share", type=float, default=0.3334, help="of the queries")
    parser.add_argument("--target", type=float, default=0.992, help="mean agreement with the full model's best K")


def read_split(
    parser: argparse.ArgumentParser, options: argparse.Namespace, validation_share: float = 0.0
) -> tuple[ScorePaths, Split, dict[str, Any]]:
    """The paths, which queries are in which part, and what a record's config says of both.

    A record that exists ends the command.
    """
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    paths = ScorePaths.load(options.paths)
    if options.candidates is not None:
        paths = paths.first(options.candidates)
    n_validation, n_report = (round(share * len(paths.queries)) for share in (validation_share, options.report_share))
    split = split_queries(paths.queries, n_validation, n_report, options.split_seed)
    digest = hashlib.sha256(options.paths.read_bytes()).hexdigest()
    config = {
        "candidates": options.candidates,
        "target": options.target,
        "paths": {"file": options.paths.name, "sha256": digest, "provenance": dict(paths.provenance)},
        "split": {"seed": options.split_seed, **vars(split)},
    }
    return paths, split, config
