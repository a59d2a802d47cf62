"""A table of the tiny model, with losses by a known rule."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.table import fitted_table
from rap_env.evaluation.table import ScoreTable, about_model, save_tables
from rap_env.llm.loading import build_tiny_llm

DENSE_LOSS = 3.5
_COSTS = np.array([0.5, 0.1, 0.3, 0.2, 0.4, 0.1, 0.2, 0.6])  # of the eight sites, which have one part each


def loss_of(widths) -> float:
    """Dropping costs more, the more is dropped already."""
    return DENSE_LOSS + np.expm1(float((1 - np.array(widths)) @ _COSTS))


_ALL = list(np.ndindex(*(2,) * 8))
_MEASURED = np.random.default_rng(0).random(len(_ALL)) < 0.6
LOSSES = {widths: loss_of(widths) for widths, is_one in zip(_ALL, _MEASURED, strict=True) if is_one or all(widths)}


def tiny_tables() -> tuple[list[ScoreTable], dict[str, Any]]:
    """Of two windows of 16 tokens, and of the first alone with losses 1 higher; three in five masks are measured."""
    llm = build_tiny_llm()
    about = {"name": "toy", "identities": [], "skipped": 0}
    tables = [
        fitted_table(
            {widths: loss + higher for widths, loss in LOSSES.items()},
            llm.shape,
            about | {"windows": [n, 16], "tokens": 16 * n},
        )
        for n, higher in ((2, 0.0), (1, 1.0))
    ]
    return tables, about_model(llm)


def write_tiny_tables(folder: Path) -> Path:
    """The same as a file."""
    save_tables(folder / "toy.npz", *tiny_tables())
    return folder / "toy.npz"
