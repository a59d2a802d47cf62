"""Times a call in a unit that slows down with the machine: the pass of a small network."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

BATCH_SIZE = 64  # what PPO of Stable-Baselines3 learns from at once
WIDTH = 64  # of its layers
LIMIT = 4  # passes that a call on an environment may take; an idle core takes less than one


def passes(call: Callable, before: Callable = lambda: None, repeats: int = 100) -> float:
    """Median time of `call` over that of a forward and backward pass, of which one is made after each call.

    Both are times of this thread alone, but a machine on which others run can make those ten times as long, too.
    """
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    inputs = torch.ones(BATCH_SIZE, WIDTH)
    of_calls, of_passes = [], []
    for _ in range(repeats):
        before()
        of_calls.append(_thread_seconds(call))
        of_passes.append(_thread_seconds(lambda: network(inputs).sum().backward()))
    return statistics.median(of_calls) / statistics.median(of_passes)


def _thread_seconds(call: Callable) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started
