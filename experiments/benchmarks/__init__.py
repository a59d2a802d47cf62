"""The parts of `python -m experiments.benchmark`: each measures a plain way and ours alternately in one run."""

import importlib
from types import ModuleType

from rap_env.errors import UnknownName

PARTS = (
    "profile",
    "rounding",
    "gsi",
    "sites",
    "scoring",
    "population",
    "decoding",
    "env",
    "scaling",
    "quantised",
    "bits",
    "live",
    "peaks",
    "memory",
    "table",
    "workers",
)


def part(name: str) -> ModuleType:
    """A part's module, with its functions `measure(bench, progress)` and `lines(results)`.

    Raises:
        UnknownName: There is no such part.
    """
    if name not in PARTS:
        raise UnknownName("benchmark part", name, PARTS)
    return importlib.import_module(f"experiments.benchmarks.{name}")
