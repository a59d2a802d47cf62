"""Measures a serving table on the real model: how long steps and switches take with each of a ladder of masks."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch

from rap_env.errors import InvalidConfig
from rap_env.llm.live import LiveModel, Reading
from rap_env.llm.live_cache import SequenceCache
from rap_env.mask import PruningMask
from rap_env.memory.footprint import activation_bytes
from rap_env.serving.tables import Level, ServingTable

_SHORTEST_SECONDS = 1e-6  # of a step: a fit on a busy machine may say none


@dataclass(frozen=True)
class StepCase:
    """What a step reads: the next token of some sequences, each with so many tokens cached, and a chunk of a prompt."""

    n_sequences: int
    cached_tokens: int
    prompt_tokens: int

    @property
    def attended_tokens(self) -> int:
        """Cached tokens that the sequences of the step attend to, those that it reads included."""
        return self.n_sequences * (self.cached_tokens + 1) + self.prompt_tokens


@dataclass(frozen=True)
class Ladder:
    """The masks of a table, from the dense one down.

    Attributes:
        masks: Each within the one before it.
        names: What they are called.
        losses_over_dense: What each costs, in nats.
        losses_are: Where these are from; the table says so.

    Raises:
        InvalidConfig: There is not one name and one loss for each mask.
    """

    masks: tuple[PruningMask, ...]
    names: tuple[str, ...]
    losses_over_dense: tuple[float, ...]
    losses_are: str

    def __post_init__(self) -> None:
        if not len(self.masks) == len(self.names) == len(self.losses_over_dense):
            raise InvalidConfig(
                f"expected a name and a loss for each of the {len(self.masks)} masks;"
                f" got {len(self.names)} and {len(self.losses_over_dense)}"
            )


def measure_table(
    model: LiveModel,
    ladder: Ladder,
    max_batch: int = 16,
    read_tokens: int = 512,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, all_of_them: None,
) -> ServingTable:
    """Runs steps and switches, and fits the table's seconds to the shortest of each, which others disturbed least.

    The fit is a least-squares one of relative errors with non-negative coefficients. Steps that no fit has seen say how
    far it is off: `measured` has the median and the largest relative error of both. A switch is timed without sequences
    in flight, so the copying of their caches is not in it.

    Args:
        model: The dense mask is applied to it in the end.
        ladder: What to measure.
        max_batch: Sequences in flight at most.
        read_tokens: Tokens that a step reads at most.
        repeats: How often each step and switch is timed, all levels in turn.
        progress: Is told how many of all repeats are done.

    Raises:
        InvalidTable: The masks are no ladder.
        InvalidConfig: The sizes are too small for any step.
    """
    fitted, held_out = _cases(max_batch, read_tokens, model.llm.shape.context_tokens)
    cases = fitted + held_out
    steps: dict[tuple[int, StepCase], list[float]] = {}
    switches: dict[tuple[int, int], list[float]] = {}
    places = range(len(ladder.masks))
    model.switch(ladder.masks[0])
    for repeat in range(repeats):
        for level in places:
            model.switch(ladder.masks[level])
            caches = _filled(model, max_batch, max(case.cached_tokens for case in cases), read_tokens)
            for case in cases:
                steps.setdefault((level, case), []).append(_timed_step(model, caches, case))
        model.switch(ladder.masks[0])
        for before, after in _tour(len(ladder.masks)):
            model.switch(ladder.masks[before])
            started = time.perf_counter()
            model.switch(ladder.masks[after])
            switches.setdefault((before, after), []).append(time.perf_counter() - started)
        progress(repeat + 1, repeats)
    model.switch(ladder.masks[0])
    seconds = {key: min(values) for key, values in steps.items()}
    rows = [(level, case) for level in places for case in fitted]
    fit = _fit(_design(rows, len(places)), [seconds[row] for row in rows])
    others = [(level, case) for level in places for case in held_out]
    moves = list(switches)
    moved = _design_of_switches(moves, [mask.weight_bytes for mask in ladder.masks])
    of_switches = [min(switches[move]) for move in moves]
    switch_fit = _fit(moved, of_switches)
    errors = {
        "fitted_steps": _errors(_design(rows, len(places)) @ fit, [seconds[row] for row in rows]),
        "held_out_steps": _errors(_design(others, len(places)) @ fit, [seconds[row] for row in others]),
        "switches": _errors(moved @ switch_fit, of_switches),
    }
    shape = model.llm.shape
    return ServingTable(
        levels=tuple(_levels(ladder, fit, switch_fit)),
        fixed_bytes=shape.fixed_bytes,
        activation_bytes=activation_bytes(shape, ladder.masks[0], read_tokens, max_batch),
        max_batch=max_batch,
        read_tokens=read_tokens,
        cached_token_seconds=float(fit[-1]),
        byte_down_seconds=float(switch_fit[-2]),
        byte_up_seconds=float(switch_fit[-1]),
        measured={
            "model": model.llm.name,
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "relative_errors": errors,
            "losses": ladder.losses_are,
        },
    )


def _cases(max_batch: int, read_tokens: int, context_tokens: int) -> tuple[list[StepCase], list[StepCase]]:
    """Steps to fit, and steps that no fit sees."""
    longest = min(1024, context_tokens // 2)
    chunk = min(read_tokens - max_batch, context_tokens - 1)
    if chunk < 4 or longest < 4:
        raise InvalidConfig(
            f"expected room for 4 prompt tokens beside {max_batch} sequences, and a context of 8; got"
            f" read_tokens={read_tokens} and a context of {context_tokens}"
        )
    few, short = max(1, max_batch // 4), longest // 8
    fitted = [StepCase(n, cached, 0) for n in (1, few, max_batch) for cached in (short, longest)]
    fitted += [StepCase(0, 0, chunk // 4), StepCase(0, 0, chunk)]
    fitted += [StepCase(few, short, chunk // 2), StepCase(max_batch, longest // 2, chunk // 4)]
    half = max(1, max_batch // 2)
    held_out = [StepCase(half, longest // 2, 0), StepCase(max_batch, longest // 4, 0)]
    held_out += [StepCase(half, longest // 2, chunk), StepCase(1, short, chunk // 3), StepCase(0, 0, chunk // 2)]
    return list(dict.fromkeys(fitted)), [case for case in dict.fromkeys(held_out) if case not in fitted]


def _filled(model: LiveModel, n_caches: int, n_tokens: int, chunk: int) -> list[SequenceCache]:
    """Caches with room for one more token, whose memory was written to; the first is read, the others are copies."""
    first = model.new_cache(n_tokens + 1)
    while first.length < n_tokens:
        model.read([(first, [1] * min(chunk, n_tokens - first.length))])
    return [first, *(copy.deepcopy(first) for _ in range(n_caches - 1))]


def _timed_step(model: LiveModel, caches: Sequence[SequenceCache], case: StepCase) -> float:
    """Seconds of one step."""
    readings: list[Reading] = []
    for cache in caches[: case.n_sequences]:
        cache.length = case.cached_tokens
        readings.append((cache, [1]))
    if case.prompt_tokens:
        readings.append((model.new_cache(case.prompt_tokens), [1] * case.prompt_tokens))
    started = time.perf_counter()
    model.read(readings).argmax(-1)
    return time.perf_counter() - started


def _tour(n_levels: int) -> list[tuple[int, int]]:
    """Switches from each end to every level and back, and between neighbours."""
    ends = (0, n_levels - 1)
    return [(a, b) for a, b in permutations(range(n_levels), 2) if a in ends or b in ends or abs(a - b) == 1]


def _design(rows: Sequence[tuple[int, StepCase]], n_levels: int) -> np.ndarray:
    """A row for each step: three columns for each level, and one for cached tokens."""
    design = np.zeros((len(rows), 3 * n_levels + 1))
    for row, (level, case) in zip(design, rows, strict=True):
        row[3 * level : 3 * level + 3] = 1.0, case.prompt_tokens, case.n_sequences
        row[-1] = case.attended_tokens
    return design


def _design_of_switches(moves: Sequence[tuple[int, int]], weight_bytes: Sequence[int]) -> np.ndarray:
    """A row for each switch: a column for each level that it may go to, and two for bytes that go and come."""
    design = np.zeros((len(moves), len(weight_bytes) + 2))
    for row, (before, after) in zip(design, moves, strict=True):
        row[after] = 1.0
        moved = weight_bytes[before] - weight_bytes[after]
        row[-2:] = max(0, moved), max(0, -moved)
    return design


def _fit(design: np.ndarray, seconds: Sequence[float]) -> np.ndarray:
    """Non-negative coefficients with the smallest sum of squared relative errors; columns are scaled for the solver."""
    from scipy.optimize import nnls  # here, and not for everyone who reads a table

    relative = design / np.array(seconds)[:, None]
    scales = np.maximum(np.linalg.norm(relative, axis=0), np.finfo(float).tiny)
    return nnls(relative / scales, np.ones(len(seconds)))[0] / scales


def _errors(predicted: np.ndarray, seconds: Sequence[float]) -> dict[str, float]:
    off = np.abs(predicted / np.array(seconds) - 1.0)
    return {"median": float(np.median(off)), "largest": float(off.max()), "cases": len(off)}


def _levels(ladder: Ladder, fit: np.ndarray, switch_fit: np.ndarray) -> list[Level]:
    whole = sum(component.weight_bytes for component in ladder.masks[0].components)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "kept_share": mask.weight_bytes / whole,
            "weight_bytes": mask.weight_bytes,
            "kv_bytes_per_token": mask.kv_bytes_per_token,
            "loss_over_dense": float(loss),
            "base_seconds": max(_SHORTEST_SECONDS, float(fit[3 * place])),
            "prompt_token_seconds": float(fit[3 * place + 1]),
            "sequence_seconds": float(fit[3 * place + 2]),
            "switch_seconds": float(switch_fit[place]),
        }
        for place, (mask, name, loss) in enumerate(
            zip(ladder.masks, ladder.names, ladder.losses_over_dense, strict=True)
        )
    ]
    return [Level(**row) for row in rows]
