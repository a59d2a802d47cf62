"""Lanes: rows that do not depend on each other, computed side by side by threads that never wait for one another."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

Part, Result = TypeVar("Part"), TypeVar("Result")

_LEAST_TOKENS = 128  # of a lane; fewer are not worth a thread
_HERE = threading.local()  # `in_lane` is set in the threads of the pool


def n_lanes(tokens: int, device: torch.device) -> int:
    """How many lanes a stream of so many tokens is worth: on a CPU one for each of torch's threads, elsewhere one.

    Inside a lane it is one.
    """
    if device.type != "cpu" or getattr(_HERE, "in_lane", False):
        return 1
    return max(1, min(torch.get_num_threads(), tokens // _LEAST_TOKENS))


def cut(sizes: Sequence[int], n_parts: int) -> list[slice]:
    """Cuts a row of sizes into at most so many runs of about equal sum, none of them empty."""
    share, bounds = sum(sizes) / n_parts, [0]
    for index, total in enumerate(accumulate(sizes), 1):
        if total + 0.5 * sizes[min(index, len(sizes) - 1)] > share * len(bounds) or index == len(sizes):
            bounds.append(index)
    return [slice(first, last) for first, last in pairwise(bounds)]


def in_lanes(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Calls a function for each part, side by side, and returns the results in order.

    Several threads in one operation meet at a barrier some thousand times in a forward and each time wait for the
    slowest.

    Args:
        work: Called with one part, in a thread of its own and the caller's inference mode.
        parts: What the work was cut into; a single part is worked on by the caller, and so are all parts inside a lane,
            which would otherwise wait for threads of its own pool.
    """
    if len(parts) == 1 or getattr(_HERE, "in_lane", False):
        return [work(part) for part in parts]
    inference, all_threads = torch.is_inference_mode_enabled(), torch.get_num_threads()
    own_threads = max(1, all_threads // len(parts))

    def lane(part: Part) -> Result:
        _HERE.in_lane = True
        if torch.get_num_threads() != own_threads:
            torch.set_num_threads(own_threads)  # of this thread, and of threads that begin later
        with torch.inference_mode(inference):
            return work(part)

    try:
        return list(_threads(len(parts)).map(lane, parts))
    finally:
        torch.set_num_threads(all_threads)  # for threads that begin later; the lanes keep theirs


@functools.cache
def _threads(n_lanes: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_lanes, thread_name_prefix="lane")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads, and would wait for them for ever
    os.register_at_fork(after_in_child=_threads.cache_clear)
