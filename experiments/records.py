"""Write-once JSON records: what was run, on what, and what came out."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

import rap_env
from rap_env.errors import RecordExists, RecordUnreadable
from rap_env.evaluation.identity import engine_identity
from rap_env.files import write_once
from rap_env.llm.switchable import SwitchableLLM
from rap_env.reading import reading, unpacked_gzip

REQUIRED_KEYS = ("config", "provenance", "results")
COMPRESSED = ".jsonl.gz"  # ending of a table that is compressed
_DISTRIBUTIONS = (
    *("rap-env", "torch", "transformers", "lm_eval", "gymnasium"),
    *("stable_baselines3", "sb3_contrib", "hydra-core", "numpy"),
)


def dense_scores(results: Mapping[str, Any], evaluator: str) -> list[float]:
    """The dense model's score for each reported scenario of a run; where kinds of text are told apart they differ."""
    references, known = results["references"]["dense"], results["dense"][evaluator]
    return [
        references[place]["reports"][evaluator]["score"] if row.get("kind") else known
        for place, row in enumerate(results["rows"])
    ]


def provenance() -> dict[str, Any]:
    """Everything beside the config that a result may depend on; what can't be found out is None.

    Returns:
        `versions` of Python and the libraries, `git` (commit, and whether tracked files differ from it), `hardware`,
        `platform` and `time_utc`.
    """
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _DISTRIBUTIONS},
        "git": git_state(Path(rap_env.__file__).parent),
        "hardware": _hardware(),
        "platform": platform.platform(),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def model_provenance(llm: SwitchableLLM, corpus_digest: str) -> dict[str, Any]:
    """The rest that a run's results depend on: model, calibration text, and our engine on this machine."""
    identity = engine_identity(llm)
    return {
        "model_digest": identity["model"],
        "tokenizer_digest": identity["tokenizer"],
        "corpus_digest": corpus_digest,
        "engine_version": identity["engine"],
        "numeric_platform": identity["platform"],
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(package: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that a package lies in.

    Untracked files do not make a checkout dirty, for every new record would.

    Args:
        package: The package's folder.

    Returns:
        None if git does not track the package's `__init__.py`: not installed from a checkout, or installed into an
        environment that happens to lie in somebody else's.
    """
    # Inside a git hook these would point git at the hook's repository instead of the package's.
    misleading = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in misleading}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]  # a record must not disturb a commit being made
        run = subprocess.run(command, cwd=package, env=environment, capture_output=True, timeout=30, check=True)
        return run.stdout.decode(errors="replace").strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # POSIX only
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _hardware() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only; it knows of taskset's and cpusets' limits
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "vectors": torch.backends.cpu.get_cpu_capability(),  # of the CPU kernels that torch chose
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(n_gpus)],
    }


def _plain(value: object) -> object:
    """JSON's form of the few other types that results hold."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"records hold JSON values, numpy values and paths; got {type(value).__name__}: {value!r}")


def _check_keys(path: Path, record: Mapping[str, Any]) -> None:
    missing = [key for key in REQUIRED_KEYS if key not in record]
    if missing:
        raise ValueError(f"{path}: a record needs {', '.join(REQUIRED_KEYS)}; missing: {', '.join(missing)}")


def write_record(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Writes a record in one piece, or not at all; missing folders are made.

    Args:
        path: The file to create; it is returned.
        record: Holds at least `config`, `provenance` and `results`.

    Raises:
        RecordExists: There is a record already; it is left as it is.
        ValueError: A key is missing, or a number is not finite.
        TypeError: A value has no JSON form.
    """
    path = Path(path)
    _check_keys(path, record)
    try:
        text = json.dumps(dict(record), default=_plain, allow_nan=False, ensure_ascii=False, indent=2, sort_keys=True)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON values and finite numbers only; {error}") from error
    try:
        return write_once(path, text + "\n")
    except FileExistsError as error:
        raise RecordExists(f"{path} exists, and records are written once; name another file or remove it") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
        RecordUnreadable: The file is not there, is not JSON, or a required key is missing.
    """
    with reading(path, "a record", RecordUnreadable):
        return _parsed(Path(path), Path(path).read_text(encoding="utf-8"))


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a JSON-lines table, of a folder whose subfolders hold `record.json` files, or a single one.

    A table may be compressed (`.jsonl.gz`): records of many masks repeat the same names.

    Raises:
        RecordUnreadable: The file can't be read or is not what its name says, or a line is no record.
        ValueError: The folder holds no record.
    """
    path = Path(path)
    if path.name.endswith((".jsonl", COMPRESSED)) and not path.is_dir():
        with reading(path, "a table of records", RecordUnreadable):
            content = path.read_bytes()
            content = unpacked_gzip(content) if path.name.endswith(COMPRESSED) else content
            return [_parsed(path, line) for line in content.decode().splitlines() if line.strip()]
    paths = sorted(path.rglob("record.json")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"expected record.json files in {path} or its subfolders; there are none")
    return [read_record(found) for found in paths]


def _parsed(path: Path, text: str) -> dict[str, Any]:
    record = json.loads(text)
    _check_keys(path, record)
    return record
