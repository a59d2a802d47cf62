"""Random decisions of every kind of policy, counted where over budget: `python -m scripts.random_decisions n=10000`.

On a model of eight whole sites, on one of parts, and a hundredth of them on the embedded table's 810 parts. Needs the
checkout's tests; ends with 1 if a mask needs more than its budget.
"""

import argparse
import sys
import time
from pathlib import Path

from rap_env.evaluation.table import load_tables
from rap_env.llm.loading import build_tiny_llm
from scripts.options import parsed, write_results
from tests.hardening.decisions import POLICIES, over_budget
from tests.hardening.model_subjects import grouped


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.random_decisions", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000, help="of every kind of policy")
    parser.add_argument("--seed", type=int, default=0, help="of policies and scenarios")
    parser.add_argument("--record", type=Path, help="a new file for what came of them")
    options = parsed(parser, arguments)
    hundredth = options.n // 100
    on_parts = (options.n - hundredth) // 2
    sizes = {"parts": on_parts, "table": hundredth, "blocks": options.n - hundredth - on_parts}
    shapes = {"blocks": build_tiny_llm().shape, "parts": grouped().shape, "table": load_tables().shape}
    results, over = {}, []
    for kind in POLICIES:
        started = time.perf_counter()
        for name, n in sizes.items():
            over += over_budget(kind, shapes[name], n, options.seed)
        results[kind] = {"decisions": sizes, "seconds": time.perf_counter() - started}
        print(f"{kind}: {options.n} decisions; over budget so far: {len(over)}", flush=True)
    write_results(options, {"of_policies": results, "over_budget": over})
    return min(1, len(over))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
