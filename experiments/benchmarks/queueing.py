"""Throughput of many workers, simulated from measured times: tasks, the driver's work for each batch, one store."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Costs(NamedTuple):
    """Seconds that were measured.

    Attributes:
        tasks: Of evaluations in a worker, a sample.
        batch: Of the driver, for each batch that it hands out and takes back.
        store: Of the store, for each result; one after another, whoever writes.
    """

    tasks: Sequence[float]
    batch: float
    store: float


def throughput(
    costs: Costs, n_workers: int, batch_masks: int = 4, workers_each: int | None = None, per_worker: int = 40
) -> float:
    """Evaluations a second in the long run.

    A driver is one process: it hands out batches and stores results, one thing after another. All drivers write into
    one store, which takes one transaction at a time. A worker has its next batch before it has finished the last one,
    so it waits only while two of its batches wait for its driver.

    Args:
        costs: What was measured.
        n_workers: Of all drivers together.
        batch_masks: Masks in a batch.
        workers_each: Workers of each driver; None for one driver of all.
        per_worker: Batches that each worker gets, on average, in the simulation.
    """
    generator, each = np.random.default_rng(0), workers_each or n_workers
    drivers_free_at = [0.0] * -(-n_workers // each)
    store_free_at = 0.0
    lengths = generator.choice(np.asarray(costs.tasks), (per_worker * n_workers, batch_masks)).sum(axis=1)
    free_at = [0.0] * n_workers  # when the worker has finished all that it was given
    finished = []  # (time, worker) of batches that are done, or are going to be
    given = 0
    for worker in [worker for _queued in range(2) for worker in range(n_workers)]:
        free_at[worker] += lengths[given]
        heapq.heappush(finished, (free_at[worker], worker))
        given += 1
    ends = []
    while finished:
        at, worker = heapq.heappop(finished)
        driver = worker // each
        now = max(at, drivers_free_at[driver])
        for _mask in range(batch_masks):
            now = store_free_at = max(now, store_free_at) + costs.store
        now += costs.batch
        drivers_free_at[driver] = now
        ends.append(now)
        if given < len(lengths):
            free_at[worker] = max(free_at[worker], now) + lengths[given]
            heapq.heappush(finished, (free_at[worker], worker))
            given += 1
    first, last = len(ends) // 4, 3 * len(ends) // 4  # without the beginning, when all start at once, and the end
    ends.sort()
    return batch_masks * (last - first) / (ends[last] - ends[first])


def largest(costs: Costs, efficiency: float, sizes: Sequence[int], **layout: int) -> int:
    """The most workers of those sizes that still evaluate so much of what as many alone would; 0 for none.

    Args:
        costs: What was measured.
        efficiency: Above 0 and at most 1.
        sizes: Numbers of workers.
        **layout: As `throughput` takes it.
    """
    alone = 1 / float(np.mean(costs.tasks))
    return max((n for n in sizes if throughput(costs, n, **layout) >= efficiency * n * alone), default=0)
