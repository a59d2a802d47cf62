"""Part `table`: how many steps a second `rap/Width-v0` takes where a table answers."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from experiments.benchmarks.bench import Bench


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Episodes of one step, each with its reset, a scenario and a mask of its own, in one process without batches.

    Seconds of the processor are told beside those of the clock, for other processes may use the machine.
    """
    options = bench.options["table"]
    steps, repeats = options["steps"], options["repeats"]
    env = gymnasium.make("rap/Width-v0", evaluation="table")
    env.reset(seed=0)
    seconds, cpu_seconds, measured = [], [], 0
    for repeat in range(repeats):
        shape = (steps, *env.action_space.shape)
        actions = np.random.default_rng(repeat).uniform(-1.0, 1.0, shape).astype(np.float32)
        started, cpu_started = time.perf_counter(), time.process_time()
        for action in actions:
            env.reset()
            *_, info = env.step(action)
            measured += next(iter(info["tasks"].values()))["measured"]
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        progress(repeat + 1, repeats)
    return {
        "steps": steps,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps_per_second": steps / statistics.median(seconds),
        "steps_per_cpu_second": steps / statistics.median(cpu_seconds),
        "measured_masks": measured,
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    return [
        f"rap/Width-v0 on the table: {results['steps_per_second']:,.0f} steps a second,"
        f" {results['steps_per_cpu_second']:,.0f} a second of its processor (median of {len(results['seconds'])})"
    ]
