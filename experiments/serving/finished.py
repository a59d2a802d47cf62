"""What became of systems that have served is kept beside their lines, so that a replay that was killed goes on."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.serving.child import Kill, Outcome, Sample
from rap_env.errors import RecordUnreadable
from rap_env.files import write_over
from rap_env.reading import reading


def keep(path: Path, spec: Mapping[str, Any], outcome: Outcome) -> None:
    """Writes what a system's watchdog saw, with what the system was asked to do."""
    write_over(path, json.dumps({"spec": spec, "outcome": asdict(outcome)}))


def kept(path: Path, spec: Mapping[str, Any]) -> Outcome | None:
    """What was kept, if a system was asked to do exactly this; else None.

    Raises:
        RecordUnreadable: The file is damaged: remove it, and the system serves again.
    """
    if not path.exists():
        return None
    with reading(path, "what became of a system", RecordUnreadable):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["spec"] != json.loads(json.dumps(spec)):  # as it was written: tuples are lists then
            return None
        told = found["outcome"]
        kill = None if told["kill"] is None else Kill(**told["kill"])
        return Outcome(**{**told, "kill": kill, "samples": [Sample(*each) for each in told["samples"]]})
