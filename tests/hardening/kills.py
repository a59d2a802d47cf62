"""Work that is killed at random moments and begun again: what was finished stays, and no half-written file is read."""

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import train
from experiments.records import read_record
from rap_env.evaluation.store import ResultStore
from rap_env.export import hf
from rap_env.export.save import export_pruned
from rap_env.files import write_over
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.policies import load_policy
from tests.serving.endpoint_cases import PLENTY, served, until

_QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "~hydra.callbacks.report")
_DROPPED = ("layer0.mlp", "layer2.attention")
_EXPORTS = 6
_ANSWERS = 8
_TOKENS = torch.tensor([[5, 77, 130, 9, 200, 31]])


@dataclass(frozen=True)
class Work:
    """Something that is killed.

    Attributes:
        run: Does it in a folder, or goes on with it.
        whole: What is finished in the folder, by name; reads all that a reader would. Raises where it is damaged.
    """

    run: Callable[[Path], None]
    whole: Callable[[Path], dict[str, Any]]


def _train(folder: Path, *options: str) -> None:
    os.environ["RAP_CACHE"] = str(folder / "cache")
    sys.argv = ["train.py", *options, "experiment=smoke", *_QUIET]
    train.main()


def _finished_runs(folder: Path) -> dict[str, Any]:
    """Evaluations in the store, and records with their policies."""
    found: dict[str, Any] = {}
    if (folder / "cache" / "results.db").exists():
        with ResultStore(folder / "cache" / "results.db") as store:
            found |= {json.dumps(identity, sort_keys=True): result for identity, result in store.evaluations("")}
    for path in folder.rglob("record.json"):
        found[str(path)] = read_record(path)["results"]
        load_policy(path.parent / "policy")
    return found


def _without_time(value: Any) -> Any:
    """A result without what differs from run to run, or says what the store has answered."""
    if isinstance(value, dict):
        return {key: _without_time(each) for key, each in value.items() if not _of_time(key)}
    return [_without_time(each) for each in value] if isinstance(value, list) else value


def _values(found: dict[str, Any]) -> list[str]:
    return sorted(json.dumps(_without_time(value), sort_keys=True) for value in found.values())


def _of_time(key: str) -> bool:
    return "seconds" in key or "milliseconds" in key or "fresh" in key


def _export(folder: Path) -> None:
    llm = build_tiny_llm()
    for number in range(_EXPORTS):
        if not (out := folder / str(number)).exists():
            export_pruned(llm, PruningMask.all_kept(llm.shape).drop(*_DROPPED[: 1 + number % 2]), "hf", out)


def _exported(folder: Path) -> dict[str, Any]:
    found = {}
    for number in range(_EXPORTS):
        if (out := folder / str(number)).exists():
            with torch.inference_mode():
                found[str(number)] = hf.load(out, torch.float32)(_TOKENS).logits.tolist()
    return found


def _serve(folder: Path) -> None:
    """Calls of an endpoint whose model leaves memory for a part before each of them, and comes back from the disk."""
    with served(folder / "weights") as server:
        until(lambda: server.service.step is not None)
        store, whole_bytes = server.llm.store, server.llm.store.resident.weight_bytes
        for number in range(_ANSWERS):
            if (out := folder / f"{number}.json").exists():
                continue
            server.budget.n_bytes = 0.75 * server.llm.shape.weight_bytes
            until(lambda: store.resident.weight_bytes < whole_bytes)
            server.budget.n_bytes = PLENTY
            until(lambda: store.resident.weight_bytes == whole_bytes)
            write_over(out, json.dumps(server.ask([5, 77, 130, number]).choices[0].text))


def _answered(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


WORKS = {
    "training": Work(lambda folder: _train(folder, "agent=greedy_gsi", f"hydra.run.dir={folder}/run"), _finished_runs),
    "comparing": Work(
        lambda folder: _train(folder, "--multirun", "agent=random,greedy_gsi", f"hydra.sweep.dir={folder}/sweep"),
        _finished_runs,
    ),
    "exporting": Work(_export, _exported),
    "serving": Work(_serve, _answered),
}


def killed(name: str, folder: Path, n_kills: int, seed: int = 0, n_undisturbed: int = 2) -> dict[str, Any]:
    """Kills work again and again, lets it end each time it has survived, and begins anew in another folder.

    Args:
        name: Of `WORKS`.
        folder: An empty one.
        n_kills: How often.
        seed: Of the moments.
        n_undisturbed: How often it is first run without a kill, for its time: the first run may be slower.

    Returns:
        How many `kills` there were, `completions`, pieces that were `finished` when it was killed, and the `faults`.
    """
    work, rng = WORKS[name], random.Random(f"{name} {seed}")
    seconds = min(_undisturbed_seconds(work, folder / f"undisturbed{n}") for n in range(n_undisturbed))
    expected = work.whole(folder / "undisturbed0")
    counts = {"kills": 0, "completions": 0, "finished": 0, "undisturbed_seconds": seconds, "faults": []}
    while counts["kills"] < n_kills:
        place, before = folder / f"killed{counts['completions']}", {}
        while (status := _forked(work, place, rng.uniform(0.0, 1.1 * seconds))) != 0 and counts["kills"] < n_kills:
            counts["kills"] += 1
            if status != -signal.SIGKILL:
                counts["faults"].append(f"{name} ended with {status} when it was begun again")
            after = work.whole(place)
            counts["finished"] += len(after)
            counts["faults"] += [f"{name} lost {key[:200]}" for key in before if after.get(key) != before[key]]
            before = after
        if _forked(work, place, None) != 0:
            counts["faults"].append(f"{name} can't be ended after it was killed")
            break
        counts["completions"] += 1
        if _values(work.whole(place)) != _values(expected):
            counts["faults"].append(f"{name} came to something else than undisturbed")
    return counts


def _undisturbed_seconds(work: Work, folder: Path) -> float:
    started = time.monotonic()
    assert _forked(work, folder, None) == 0
    return time.monotonic() - started


def _forked(work: Work, folder: Path, seconds: float | None) -> int:
    """The exit code of a child, or minus the signal that ended it; it is killed after some seconds.

    Forked, because importing takes longer than the work.
    """
    folder.mkdir(exist_ok=True)
    if (pid := os.fork()) == 0:
        code = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                work.run(folder)
            code = 0
        except SystemExit as stopped:
            code = int(bool(stopped.code))
        finally:
            os._exit(code)
    end = None if seconds is None else time.monotonic() + seconds
    while not (waited := os.waitpid(pid, os.WNOHANG))[0]:
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            end = None
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(waited[1])
