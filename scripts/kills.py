"""Kills training, comparing, exporting and serving on the tiny model: `python -m scripts.kills kills=50 record=FILE`.

Each is begun again until it ends. Needs the checkout's tests; ends with 1 if something was lost or half-written.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

from scripts.options import parsed, write_results
from tests.hardening.kills import WORKS, killed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of all of them together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", type=Path, help="a new file for what came of them")
    options = parsed(parser, arguments)
    found = {}
    for number, name in enumerate(WORKS):
        n_kills = options.kills // len(WORKS) + (number < options.kills % len(WORKS))
        with tempfile.TemporaryDirectory() as folder:
            found[name] = killed(name, Path(folder), n_kills, options.seed)
        print(f"{name}: {found[name]}", flush=True)
    write_results(options, found)
    return min(1, sum(len(each["faults"]) for each in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
