"""A run's folder: it belongs to one process, and what is finished in it is not done again."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.records import read_record
from rap_env.errors import FolderInUse, RecordExists
from rap_env.evaluation.owners import is_gone, this_process
from rap_env.files import write_once

RECORD_NAME = "record.json"
_CLAIM = ".claim-"
_LEAVES_RESULTS_AS_THEY_ARE = ("tracker", "store", "workers", "in_flight")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds a folder that no other run may use meanwhile; the claim of a process that is dead is taken over.

    Claims are numbered files. Who finds only dead ones creates the next number, which succeeds for one of many, and
    removes none but its own: so nobody ever removes a claim that another has just made.

    Raises:
        FolderInUse: A run that is alive holds it, or one on another host, where that can't be known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = _claim(folder)
    try:
        _refuse_others(folder, own)  # who found none may have come between two takeovers
        yield
    finally:
        own.unlink(missing_ok=True)


def _claim(folder: Path) -> Path:
    while True:
        _refuse_others(folder)
        numbers = [int(path.name.removeprefix(_CLAIM)) for path in _claims(folder)]
        own = folder / f"{_CLAIM}{max(numbers, default=0) + 1}"
        with contextlib.suppress(FileExistsError):
            write_once(own, this_process())
            return own


def _claims(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_CLAIM}*") if path.name.removeprefix(_CLAIM).isdecimal()]


def _refuse_others(folder: Path, own: Path | None = None) -> None:
    for path in _claims(folder):
        with contextlib.suppress(FileNotFoundError):
            owner = path.read_text(encoding="utf-8")
            if path != own and not is_gone(owner, renewed_at=time.time()):
                host, pid, *_started = json.loads(owner)
                raise FolderInUse(
                    f"{folder} is in use by process {pid} on {host}; name another folder (hydra.run.dir=...), or remove"
                    f" {path.name} there if that process is gone"
                )


def finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of the record in a folder, if there is one.

    Raises:
        RecordExists: It is of another config.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    record = read_record(path)
    recorded = record["config"]
    keys = (recorded.keys() | config.keys()) - set(_LEAVES_RESULTS_AS_THEY_ARE)
    if other := sorted(key for key in keys if recorded.get(key) != config.get(key)):
        raise RecordExists(f"{path} is of a run with another {', '.join(other)}, and records are written once")
    return record["results"]
