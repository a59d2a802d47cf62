"""Reads damaged and hostile files: `python -m scripts.fuzz cases=10000 record=results/hardening/fuzz.json`.

A few hundred of the same are in the test suite; needs the checkout's tests. Ends with 1 if there was a fault.
"""

import argparse
import logging
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

from scripts.options import parsed, write_results
from tests.hardening.fuzzing import fuzz
from tests.hardening.model_subjects import MODELS
from tests.hardening.subjects import DATA


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--record", type=Path, help="a new file for what came of them")
    options = parsed(parser, arguments)
    logging.disable(logging.CRITICAL)  # libraries complain about each file
    subjects, of_subject, faults, started = [*DATA, *MODELS], {}, [], time.perf_counter()
    for number, subject in enumerate(subjects):
        n_cases = options.cases // len(subjects) + (number < options.cases % len(subjects))
        with tempfile.TemporaryDirectory() as folder:
            findings = fuzz(subject, Path(folder), n_cases, options.seed)
        of_subject[subject.name], faults = dict(findings.counts), faults + findings.faults
        print(f"{subject.name}: {of_subject[subject.name]}", flush=True)
    results = {
        "inputs": sum(sum(counts.values()) for counts in of_subject.values()),
        "faults": faults,
        "of_readers": of_subject,
        "seconds": time.perf_counter() - started,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(f"{results['inputs']} inputs, {len(faults)} faults")
    write_results(options, results)
    return min(1, len(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
