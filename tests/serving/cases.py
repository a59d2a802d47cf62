"""Small tables and episodes, with numbers that can be added up by hand."""

import math

from rap_env.serving.episodes import Episode
from rap_env.serving.memory_traces import MemoryTrace
from rap_env.serving.tables import Level, ServingTable
from rap_env.serving.traces import Arrival

LEVELS = (
    Level("all", 1.0, 1000, 10, 0.0, 1.0, 0.01, 0.1, 0.25),
    Level("half", 0.5, 500, 10, math.log(2.0), 0.5, 0.01, 0.1, 0.25),
)
TABLE = ServingTable(
    levels=LEVELS,
    fixed_bytes=100,
    activation_bytes=50,
    max_batch=4,
    read_tokens=100,
    cached_token_seconds=0.001,
    byte_down_seconds=0.001,
    byte_up_seconds=0.002,
    measured={},
)
WHOLE_BYTES = 2000


def episode(*arrivals: tuple[float, int, int], shares=((0.0, 1.0),), seconds: float = 100.0) -> Episode:
    """Requests as (seconds, prompt tokens, generated tokens), and a budget as (seconds, share)."""
    times, values = zip(*shares, strict=True)
    return Episode(tuple(Arrival(*one) for one in arrivals), MemoryTrace(times, values), seconds)
