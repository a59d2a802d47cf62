"""Reads damaged and hostile files, and says of each what came of it: refused in our words, read, or a fault."""

import collections
import contextlib
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rap_env.errors import RapError
from tests.hardening.mutations import mutations_of

READ, REFUSED = "read", "refused"
_PATIENCE_SECONDS = 20


@dataclass(frozen=True)
class Subject:
    """Something that reads files.

    Attributes:
        name: For messages.
        make: Fills a folder with valid files.
        read: Reads them from a folder; may raise.
        files: Names of those that are damaged, as a pattern.
        leaves: Endings of files that reading may leave beside them, or write anew.
        expected: What comes of the valid ones: what wants to run code of its own is refused.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    files: str = "*"
    leaves: tuple[str, ...] = ()
    expected: str = READ


@dataclass
class Findings:
    """What came of many inputs: how many were read, refused, or faulty, and what was wrong with the latter."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)


class _Hung(BaseException):
    """Something took too long."""


def fuzz(subject: Subject, folder: Path, n_cases: int, seed: int = 0) -> Findings:
    """Damages one file of a subject at a time.

    Args:
        subject: What is read.
        folder: An empty one.
        n_cases: How many inputs.
        seed: Of all of them.
    """
    valid, findings = folder / "valid", Findings()
    valid.mkdir(parents=True)
    subject.make(valid)
    content = {path.relative_to(valid): path.read_bytes() for path in sorted(valid.rglob("*")) if path.is_file()}
    targets = [name for name in content if name.match(subject.files)]
    assert targets, f"{subject.name} has no {subject.files}"
    found = _outcome(subject, _fresh(folder / "case", content), folder / "trap")
    assert found[0] == subject.expected, f"{subject.name}: of what is valid came {found}"
    for case in range(n_cases):
        rng = random.Random(f"{subject.name} {seed} {case}")
        target = rng.choice(targets)
        mutation, mutate = rng.choice(list(mutations_of(target.name).items()))
        with contextlib.suppress(UnicodeError):
            damaged = mutate(content[target], rng, folder / "trap")
            case_folder = _fresh(folder / "case", dict(content) | {target: damaged})
            outcome, message = _outcome(subject, case_folder, folder / "trap")
            findings.counts[outcome] += 1
            if outcome not in (READ, REFUSED):
                about = {"subject": subject.name, "case": case, "file": str(target), "mutation": mutation}
                findings.faults.append(about | {"fault": outcome, "message": message[:300]})
    return findings


def _fresh(folder: Path, content: Mapping[Path, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, each in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(each)
    return folder


def _outcome(subject: Subject, folder: Path, trap: Path) -> tuple[str, str]:
    before = _snapshot(folder, subject.leaves)
    outcome, message = READ, ""
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject.read(folder)
    except RapError as error:
        outcome, message = REFUSED, str(error)
        if not message.strip():
            outcome = "no message"
    except _Hung:
        outcome = "hung"
    except Exception as error:
        outcome, message = "foreign error", f"{type(error).__name__}: {error}"
    if trap.exists():
        trap.unlink()
        return "executed", message
    if _snapshot(folder, subject.leaves) != before:
        return "changed its input", message
    return outcome, message


def _snapshot(folder: Path, leaves: tuple[str, ...]) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(leaves or ("\0",)))
    return {str(path): path.read_bytes() for path in files}


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def hung(_signal: int, _frame: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(_PATIENCE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
