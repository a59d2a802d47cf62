"""Enters an agent's runs: `python -m scripts.enter_leaderboard RECORDS AGENT results/leaderboard.jsonl --tuned-on ...`.

docs/leaderboard.md says what is entered, and what is refused.
"""

import argparse
import sys
from pathlib import Path

from experiments.leaderboard.enter import enter
from experiments.leaderboard.rows import Tuning
from rap_env.errors import RapError


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.enter_leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="a table of runs, or a sweep's folder")
    parser.add_argument("agent", help="one of its agents; each of its token budgets becomes a row")
    parser.add_argument("table", type=Path, help="the leaderboard, results/leaderboard.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="where the texts lie, if not where they lay")
    parser.add_argument("--tuned-on", required=True, help="what the agent's settings were chosen on, 'nothing' if so")
    parser.add_argument("--tuning-tokens", type=int, required=True, help="tokens that were forwarded for that")
    options = parser.parse_intermixed_args(arguments)
    try:
        tuning = Tuning(options.tuned_on, options.tuning_tokens)
        lines = enter(options.records, options.agent, options.table, tuning, options.overrides)
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
