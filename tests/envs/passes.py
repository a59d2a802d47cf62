"""Times a call in a unit that slows down with the machine: the pass of a small network."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

BATCH_SIZE = 64  # what PPO of Stable-Baselines3 learns from at once
WIDTH = 64  # of its layers
LIMIT = 4  # passes that a call on an environment may take; an idle core takes less than one


ROUNDS = 5  # others may disturb all calls of a round, as a round takes a twentieth of a second
REPEATS = 100  # in each round


def passes(call: Callable, before: Callable = lambda: None) -> float:
    """Median time of `call` over that of a forward and backward pass, of which one is made after each call.

    Both are times of this thread alone, but a machine on which others run can make those ten times as long, too. The
    round that they disturbed least counts.
    """
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    inputs = torch.ones(BATCH_SIZE, WIDTH)
    return min(_ratio(call, lambda: network(inputs).sum().backward(), before) for _ in range(ROUNDS))


def _ratio(call: Callable, other: Callable, before: Callable) -> float:
    of_calls, of_others = [], []
    for _ in range(REPEATS):
        before()
        of_calls.append(_thread_seconds(call))
        of_others.append(_thread_seconds(other))
    return statistics.median(of_calls) / statistics.median(of_others)


def _thread_seconds(call: Callable) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started
