"""Mixed load on the endpoint under a budget that moves: `python -m scripts.soak minutes=24 record=FILE`; `make soak`.

Needs the checkout's tests. Ends with 1 if the server died, an answer was wrong, or memory grows by 1 MB a minute.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from scripts.options import parsed, write_results
from tests.hardening.soak import Endpoint, soak

_MOST_GROWTH_BYTES = 1_000_000  # a minute


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=24.0)
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, folder or hub name")
    parser.add_argument("--dtype", default="float32", help="in bfloat16 the company in a batch may tip an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the load")
    parser.add_argument("--record", type=Path, help="a new file for what came of it")
    options = parsed(parser, arguments)
    with tempfile.TemporaryDirectory() as folder:
        endpoint = Endpoint(Path(folder), f"model.name={options.model}", f"model.dtype={options.dtype}")
        try:
            results = soak(endpoint, options.minutes, options.seed)
        finally:
            endpoint.close()
    print({key: value for key, value in results.items() if key != "minutes_and_resident_bytes"})
    write_results(options, results)
    grows = (results["slope_bytes_per_minute"] or 0.0) >= _MOST_GROWTH_BYTES
    return int(results["killed"] or bool(results["faults"]) or not results["compared"] or grows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
