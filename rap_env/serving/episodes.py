"""Episodes of the simulated serving problem: a stretch of requests and a budget over time, both drawn from one seed."""

import math
from dataclasses import dataclass

import numpy as np

from rap_env.errors import InvalidConfig
from rap_env.serving.memory_traces import MemoryTrace, constant, random_walk, sawtooth, step
from rap_env.serving.traces import Arrival, Bursts, synthetic_trace


@dataclass(frozen=True)
class Setting:
    """What episodes are drawn from.

    Attributes:
        duration_seconds: How long an episode lasts.
        requests_per_second: Range that its mean rate is drawn from.
        length_scale: Times the lengths of a chat service; see `synthetic_trace`.
        longest_prompt_tokens: Cap on prompts.
        longest_generated_tokens: Cap on answers.
        memory_shares: The lowest and the highest budget that episodes have, as shares of the whole.
        whole_tokens: Cached tokens for which the dense model needs the whole: a budget share of 1 is what the dense
            model takes with so many.

    Raises:
        InvalidConfig: A number is out of its range, or a range is the wrong way round.
    """

    duration_seconds: float = 60.0
    requests_per_second: tuple[float, float] = (0.5, 2.5)
    length_scale: float = 0.2
    longest_prompt_tokens: int = 768
    longest_generated_tokens: int = 96
    memory_shares: tuple[float, float] = (0.4, 1.0)
    whole_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("duration_seconds", "length_scale"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name}: expected a positive number; got {getattr(self, name)}")
        for name in ("longest_prompt_tokens", "longest_generated_tokens", "whole_tokens"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name}: expected at least 1; got {getattr(self, name)}")
        for name in ("requests_per_second", "memory_shares"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high < math.inf:
                raise InvalidConfig(f"{name}: expected 0 < low <= high; got {low} and {high}")


@dataclass(frozen=True)
class Episode:
    """What happens in an episode, whatever is decided in it.

    Attributes:
        arrivals: The requests, in the order of time.
        memory: The budget, as shares of a whole.
        duration_seconds: When it ends.

    Raises:
        InvalidConfig: Requests are not in the order of time, begin before 0, or have no token to read or to generate;
            or the duration is not positive.
    """

    arrivals: tuple[Arrival, ...]
    memory: MemoryTrace
    duration_seconds: float

    def __post_init__(self) -> None:
        if not 0.0 < self.duration_seconds < math.inf:
            raise InvalidConfig(f"duration_seconds: expected a positive number; got {self.duration_seconds}")
        before = 0.0
        for arrival in self.arrivals:
            if not before <= arrival.seconds < math.inf:
                raise InvalidConfig(f"expected arrivals in the order of time; got {arrival.seconds} s after {before} s")
            if min(arrival.prompt_tokens, arrival.generated_tokens) < 1:
                raise InvalidConfig(f"expected at least one token to read and one to generate; got {arrival}")
            before = arrival.seconds

    @property
    def offered_tokens(self) -> int:
        """Tokens that its requests want generated."""
        return sum(arrival.generated_tokens for arrival in self.arrivals)


def draw_episode(seed: int, setting: Setting) -> Episode:
    """Draws an episode; the same one for the same seed and setting.

    Requests come in bursts of a rate that is drawn anew for each episode. The budget is of one of four kinds, each as
    often: constant, a fall that may end, a sawtooth, or a random walk.
    """
    rng = np.random.default_rng(seed)
    rate, seconds = float(rng.uniform(*setting.requests_per_second)), setting.duration_seconds
    bursts = Bursts(ratio=float(rng.uniform(2.0, 8.0)), share=0.2, requests=float(rng.uniform(5.0, 20.0)))
    drawn = synthetic_trace(  # so many that hardly any trace ends before the episode does
        int(2 * rate * seconds) + 10, rate, int(rng.integers(2**31)), setting.length_scale, bursts
    )
    arrivals = tuple(
        Arrival(
            arrival.seconds,
            min(arrival.prompt_tokens, setting.longest_prompt_tokens),
            min(arrival.generated_tokens, setting.longest_generated_tokens),
        )
        for arrival in drawn
        if arrival.seconds < seconds
    )
    return Episode(arrivals, _draw_memory(rng, setting), seconds)


def _draw_memory(rng: np.random.Generator, setting: Setting) -> MemoryTrace:
    seconds, (low, high) = setting.duration_seconds, sorted(rng.uniform(*setting.memory_shares, size=2).tolist())
    match int(rng.integers(4)):
        case 0:
            return constant(high)
        case 1:
            falls = float(rng.uniform(0.1, 0.6)) * seconds
            rises = falls + float(rng.uniform(0.1, 0.8)) * seconds
            return step(low, high, falls, rises if rises < seconds else None)
        case 2:
            return sawtooth(low, high, float(rng.uniform(0.1, 0.5)) * seconds, seconds, every_seconds=seconds / 120)
        case _:
            walk_share = 0.2 * (high - low) + 0.01
            return random_walk(low, high, seconds, int(rng.integers(2**31)), seconds / 60, walk_share)
