"""Asks all systems in turn, request by request, and keeps every answer in a file as soon as it is there."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reranking.process import Process, SystemFailed
from experiments.reranking.systems import System
from rap_env.files import write_over

_KEYS = ("repeat", "rank", "candidates", "top_k")


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        requests: Numbers of the requests.
        candidates: Sizes of a request: so many of its first documents.
        top_k: Values of K that systems which prune are asked for; the others rank all documents once.
        repeats: How often everything is asked.
        thresholds: Of each rule that prunes, by its name, whether the model is masked, candidates and K.
    """

    requests: Sequence[int]
    candidates: Sequence[int]
    top_k: Sequence[int]
    repeats: int
    thresholds: Mapping[tuple[str, bool, int, int], float]

    def commands(self, system: System, repeat: int) -> Iterator[dict[str, Any]]:
        """What a system is asked in one repeat."""
        for candidates in self.candidates:
            for number in self.requests:
                for k in self.top_k if system.prunes else [None]:
                    rule = (system.prunes, system.masks, candidates, k)
                    threshold = self.thresholds[rule] if system.prunes else None
                    asked = {"rank": number, "candidates": candidates, "top_k": k, "threshold": threshold}
                    yield {"repeat": repeat, **asked}


class AnswerFile:
    """The answers of one system, a line each. A line that a killed run left unfinished is dropped.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.answers = path, list(_whole_lines(path))
        if path.exists():
            write_over(path, "".join(json.dumps(each) + "\n" for each in self.answers))

    def has(self, command: Mapping[str, Any]) -> bool:
        """Whether a command was answered."""
        return any(all(each[key] == command[key] for key in _KEYS) for each in self.answers)

    def add(self, answer: dict[str, Any]) -> None:
        """Writes an answer down."""
        self.answers.append(answer)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(found := json.loads(line), dict) and found.keys() >= set(_KEYS):
                    yield found


def ask_all(
    systems: Mapping[str, System],
    plan: Plan,
    start: Callable[[str], Process],
    folder: Path,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Asks every system everything that its file has no answer to yet.

    Systems are asked in turn about each request, in reversed order every second time, so that a machine that slows
    down slows all of them. Every one is a process that stays as long as it has something to answer.

    Args:
        systems: By name.
        plan: What is asked.
        start: Starts a system's process.
        folder: For the files `NAME.jsonl`.
        progress: Is told how many answers there are, and how many there will be.

    Returns:
        The answers of each system, and why some systems have not all.
    """
    files = {name: AnswerFile(folder / f"{name}.jsonl") for name in systems}
    turns = [turn for repeat in range(plan.repeats) for turn in _turns(systems, plan, repeat)]
    left = [(name, command) for name, command in turns if not files[name].has(command)]
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Process] = {}
        for done, (name, command) in enumerate(left, 1):
            if name in failed:
                continue
            try:
                if name not in running:
                    running[name] = start(name)
                    stack.callback(running[name].close)
                answer = running[name].rank(command)
            except SystemFailed as error:
                failed[name] = str(error)
                continue
            process = running[name]
            files[name].add(command | answer | {"catches_peaks": process.catches_peaks})
            progress(done, len(left))
    return {name: file.answers for name, file in files.items()}, failed


def _turns(systems: Mapping[str, System], plan: Plan, repeat: int) -> list[tuple[str, dict[str, Any]]]:
    """Who is asked what in a repeat; whoever is asked less often is asked at even distances, about the same request."""
    turns = []
    for place, (name, system) in enumerate(systems.items()):
        commands = list(plan.commands(system, repeat))
        turns += [((number + 0.5) / len(commands), place, name, command) for number, command in enumerate(commands)]
    direction = 1 if repeat % 2 == 0 else -1
    return [(name, command) for _when, _place, name, command in sorted(turns, key=lambda t: (t[0], direction * t[1]))]
