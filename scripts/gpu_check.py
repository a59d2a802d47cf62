"""Checks exactness, memory and speed on a GPU and writes a record: `python -m scripts.gpu_check gpu.json`.

Takes at most six minutes on one 80 GB card. Without a GPU (`--tiny`) it runs on the CPU with a tiny model.
"""

import argparse
import sys
from pathlib import Path

import torch

from experiments.benchmarks import gpu
from experiments.benchmarks.timing import random_llama
from experiments.records import provenance, write_record
from rap_env.llm.loading import build_tiny_llm
from rap_env.memory.workload import Workload


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where the record goes; it must not be there yet")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script out")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("error: no GPU is available to torch; --tiny tries the script out on the CPU")
    if options.output.exists():
        sys.exit(f"error: {options.output} exists, and records are written once; name another file")
    if options.tiny:
        results = gpu.check(build_tiny_llm(), Workload(2, 64), repeats=1)
    else:
        results = gpu.check(random_llama("llama2-7b", "float16", "cuda"), Workload(8, 2048))
    record = {"config": {"tiny": options.tiny}, "provenance": provenance(), "results": results}
    print("\n".join([*gpu.lines(results), f"record: {write_record(options.output, record)}"]))


if __name__ == "__main__":
    main(sys.argv[1:])
