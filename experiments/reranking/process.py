"""The parent's side of a system's process: asks it, and measures its memory."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.reranking.systems import System
from experiments.serving.launch import launched
from experiments.serving.resident import ResidentMemory
from rap_env.errors import RapError

_LOG_LINES = 3
_WARM_UP_DOCUMENTS = 4


class SystemFailed(RapError):
    """A system's process ended before it answered."""


class Process:
    """A system's process; it ends with its parent.

    Args:
        name: Of the system.
        spec: What it loads.
        requests: `query` and `documents` of each that it may be asked. A command has the text of its own, so that no
            other is in the process's memory.
        log: File for what it prints.

    Attributes:
        baseline_bytes: What was resident once everything was imported, before the model was loaded.
        catches_peaks: Whether the peak of each request can be told; else memory that loading took may hide it.

    Raises:
        SystemFailed: It ended while it loaded.
    """

    def __init__(self, name: str, spec: Mapping[str, Any], requests: Sequence[Mapping[str, Any]], log: Path) -> None:
        self.name, self._requests, self._log = name, requests, log
        package = System(**spec["system"]).package
        command = launched([sys.executable, "-m", "experiments.reranking.worker", *([package] if package else [])])
        environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        try:
            self._read()
            self._memory = ResidentMemory(self._process.pid)
            self.catches_peaks, self.baseline_bytes = self._memory.catches_peaks, self._memory.now_bytes()
            self._ask({**spec, "warm_up": self._text(0, _WARM_UP_DOCUMENTS)})
        except BaseException:
            self.close()
            raise

    def rank(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a command, with `peak_bytes` above the baseline.

        Raises:
            SystemFailed: The process has ended.
        """
        self._memory.peak_bytes()  # sets the mark back
        answer = self._ask({**command, **self._text(command["rank"], command["candidates"])})
        return answer | {"peak_bytes": max(0, self._memory.peak_bytes() - self.baseline_bytes)}

    def path(self, number: int, candidates: int) -> dict[str, Any]:
        """Scores of a request after every layer, and the tokens of its documents."""
        return self._ask({"path": number, **self._text(number, candidates)})

    def close(self) -> None:
        """Ends the process."""
        if hasattr(self, "_memory"):
            self._memory.close()
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _text(self, number: int, candidates: int) -> dict[str, Any]:
        request = self._requests[number]
        return {"query": request["query"], "documents": request["documents"][:candidates]}

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        code = self._process.wait()
        last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LOG_LINES:]
        raise SystemFailed(f"{self.name} ended with {code}: {' | '.join(last)}")
