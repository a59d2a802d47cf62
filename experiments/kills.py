"""Kills writers of one result store at random: `python -m experiments.kills OUT.json results.db postgresql://...`.

Writers want the same evaluations, round after round, and are killed (SIGKILL) and replaced. What they say they began
and what was stored is held against the store: nothing that was finished may be lost, and nothing may be measured while
another who measures it is alive, or after it was finished.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rap_env.evaluation.claims import measured_once
from rap_env.evaluation.store import ResultStore

ROUND, AT_ONCE = 20, 4  # evaluations that all writers want, and how many of them each asks for at once
LONGEST_SECONDS = 0.02  # of one evaluation
_PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
_PROCESSES.set_forkserver_preload(["rap_env.evaluation.claims"])


def identity(number: int) -> dict[str, Any]:
    """Of an evaluation."""
    return {"kind": "kills", "number": number}


def _write(location: str | Path, log: Path, stop: Path, first_round: int, seed: int) -> None:
    """One writer: measures, or waits for, round after round until the file `stop` is there."""
    generator = random.Random(seed)
    with ResultStore(location) as store, open(log, "ab", buffering=0) as file:

        def say(event: str, number: int) -> None:  # one write, which is appended as a whole
            file.write(f"{json.dumps([event, number, os.getpid(), time.monotonic()])}\n".encode())

        def measure(indices: list[int]) -> Iterator[tuple[int, dict]]:
            for index in indices:
                say("begun", numbers[index])
                time.sleep(generator.uniform(0, LONGEST_SECONDS))
                yield index, {"value": numbers[index] / 7, "by": os.getpid()}
                say("stored", numbers[index])

        turn = first_round
        while not stop.exists():
            wanted = generator.sample(range(turn * ROUND, (turn + 1) * ROUND), ROUND)
            for first in range(0, ROUND, AT_ONCE):
                numbers = wanted[first : first + AT_ONCE]
                measured_once(store, [identity(number) for number in numbers], measure)
            turn += 1


def survive(location: str | Path, n_writers: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """Lets writers work on a new store, kills some at random moments, and counts what went wrong.

    Args:
        location: As of `ResultStore`.
        n_writers: Who is killed is replaced.
        kills: How many are killed.
        seed: Of moments and victims.

    Returns:
        `finished` evaluations, those of them that were `lost` (missing or another result), those `measured_twice`
        (begun while another who had begun it was alive, or when it was stored), and those `begun_again` after a death.
    """
    generator, started = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ResultStore(location) as store:
        log, stop = Path(folder) / "log", Path(folder) / "stop"
        log.touch()

        def begin(number: int) -> multiprocessing.Process:
            first_round = len(store) // ROUND
            process = _PROCESSES.Process(target=_write, args=(location, log, stop, first_round, seed + number))
            process.start()
            return process

        writers, killed_at = [begin(number) for number in range(n_writers)], {}
        for number in range(kills):
            said = _after(log, more_lines=generator.randint(4, 40))
            time.sleep(generator.uniform(0, LONGEST_SECONDS))
            last = next((place for place, writer in enumerate(writers) if writer.pid == said), 0)
            victim = generator.choice([last, generator.randrange(n_writers)])  # often one that is measuring
            killed_at[writers[victim].pid] = time.monotonic()
            writers[victim].kill()
            writers[victim].join()
            writers[victim] = begin(n_writers + number)
        stop.touch()
        for writer in writers:
            writer.join()
        assert all(writer.exitcode == 0 for writer in writers), [writer.exitcode for writer in writers]
        events = [json.loads(line) for line in log.read_text().splitlines()]
        counts = _counted(events, killed_at, store)
    return {"writers": n_writers, "kills": kills, "seconds": time.monotonic() - started, **counts}


def _after(log: Path, more_lines: int) -> int:
    """Waits until writers have said so much more, and returns who spoke last."""
    wanted = log.read_bytes().count(b"\n") + more_lines
    while len(lines := log.read_bytes().split(b"\n")[:-1]) < wanted:
        time.sleep(0.002)
    return json.loads(lines[-1])[2]


def _counted(events: Sequence[list], killed_at: dict[int, float], store: ResultStore) -> dict[str, int]:
    begun: dict[int, list[tuple[float, int]]] = defaultdict(list)
    stored: dict[int, tuple[float, int]] = {}
    for event, number, pid, at in sorted(events, key=lambda event: event[3]):
        if event == "begun":
            begun[number].append((at, pid))
        else:
            stored[number] = at, pid
    results = store.get_many([identity(number) for number in stored])
    lost = sum(
        result != {"value": number / 7, "by": pid}
        for (number, (_at, pid)), result in zip(stored.items(), results, strict=True)
    )
    again = [(number, one, two) for number, all_ in begun.items() for one, two in itertools.pairwise(all_)]
    twice = sum(
        two[0] < killed_at.get(one[1], float("inf")) or (number in stored and stored[number][0] < two[0])
        for number, one, two in again
    )
    return {"finished": len(stored), "lost": lost, "measured_twice": twice, "begun_again": len(again)}


def main() -> None:
    """The command line."""
    from experiments.records import provenance, write_record  # here, for writers do without torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the record, which must not exist")
    parser.add_argument("stores", nargs="+", help="new ones: files or PostgreSQL databases")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    results = {}
    for location in options.stores:
        kind = "postgresql" if location.startswith("postgresql") else "sqlite"
        results[kind] = survive(location, options.writers, options.kills)
        print(kind, results[kind], flush=True)
    config = {"round": ROUND, "at_once": AT_ONCE, "longest_seconds": LONGEST_SECONDS, "kills": options.kills}
    print(f"record: {write_record(options.out, {'config': config, 'provenance': provenance(), 'results': results})}")


if __name__ == "__main__":
    main()
