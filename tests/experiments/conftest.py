"""Runs of train.py in this process, on the tiny model."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import train
from experiments.records import read_record

QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "~hydra.callbacks.report")


class Ended(NamedTuple):
    """What a run of train.py said, and its exit code or message."""

    said: str
    code: object


@pytest.fixture(scope="session")
def train_here() -> Callable[..., Ended]:
    """Runs train.py with these arguments and cache folder; a second run finds what the first has built."""

    def run(cache: Path, *arguments: str) -> Ended:
        said, code = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAP_CACHE", str(cache))
            patch.setattr(sys, "argv", ["train.py", *arguments, *QUIET])
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    train.main()
                except SystemExit as stopped:
                    code = stopped.code
        return Ended(said.getvalue(), code)

    return run


@pytest.fixture(scope="session")
def run_here(train_here) -> Callable[..., dict]:
    """The record of a run in a folder."""

    def run(folder: Path, *overrides: str) -> dict:
        said, code = train_here(folder.parent / "cache", "experiment=smoke", f"hydra.run.dir={folder}", *overrides)
        assert not code, code or said
        return read_record(folder / "record.json") | {"said": said}

    return run
