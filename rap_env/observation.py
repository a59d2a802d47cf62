"""What an agent sees: pure functions of the scenario, the mask and the importance order."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from gymnasium import spaces

from rap_env.errors import check_known
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, smallest_bytes
from rap_env.memory.scenario import Scenario

KIND = "kind"  # entry of observations where workloads are of kinds of text
_LARGEST_BATCH = 1024  # scales `batch_size`; larger batches are clipped to 1


def observation_space(shape) -> spaces.Dict:
    """The observation where components are dropped; n is their number, every entry lies in [0, 1]."""
    n = len(shape.components)
    return spaces.Dict(
        {
            "memory_budget": _unit_box(1),
            "batch_size": _unit_box(1),
            "sequence_length": _unit_box(1),
            "gsi_ranking": _unit_box(n),
            "kept": spaces.MultiBinary(n),
            "footprint": _unit_box(1),
            "component_bytes": _unit_box(n),
        }
    )


def width_observation_space(shape, kinds: Sequence[str] = ()) -> spaces.Dict:
    """The observation where widths are chosen; S is the number of sites, every entry lies in [0, 1].

    Args:
        shape: The model's `ModelShape`.
        kinds: Kinds of text that workloads may be of.
    """
    n_sites = len(shape.components.sites)
    sizes = {"memory_budget": 1, "batch_size": 1, "sequence_length": 1, "footprint": 1}
    sizes |= {"site_bytes": n_sites, "site_parts": n_sites, "widths": n_sites}
    sizes |= {KIND: len(kinds)} if kinds else {}
    return spaces.Dict({name: _unit_box(size) for name, size in sizes.items()})


def observe(shape, scenario: Scenario, mask: PruningMask, order: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Builds an observation.

    Args:
        shape: The model's `ModelShape`.
        scenario: Workload and budget.
        mask: What is kept now.
        order: Component names from the least to the most important.
    """
    fixed, smallest = _scenario_entries(shape, scenario)
    kept = np.array(mask.keep, dtype=np.int8)
    return {
        **{name: entry.copy() for name, entry in fixed.items()},  # all observations of a scenario share them
        "gsi_ranking": _ranks(shape, order).copy(),
        "kept": kept,
        "footprint": _scalar(smallest + float(kept @ fixed["component_bytes"].astype(np.float64))),
    }


def observe_widths(shape, scenario: Scenario, mask: PruningMask, kinds: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Builds an observation of `width_observation_space`; it holds entries for sites instead of components.

    Args:
        shape: The model's `ModelShape`.
        scenario: Workload and budget.
        mask: What is kept now.
        kinds: Kinds of text that workloads may be of.

    Raises:
        UnknownName: The workload is of another kind.
    """
    fixed, smallest, of_sites, dense, tokens = _width_entries(shape, scenario)
    _starts, n_parts, relative_parts = _site_parts(shape)
    kept_bytes = mask.weight_bytes + mask.kv_bytes_per_token * tokens
    return {
        **{name: fixed[name].copy() for name in ("memory_budget", "batch_size", "sequence_length")},
        "footprint": _scalar(smallest + kept_bytes / dense),
        "site_bytes": of_sites.copy(),
        "site_parts": relative_parts.copy(),
        "widths": (mask.n_kept / n_parts).astype(np.float32),
        **({KIND: _of_kinds(scenario.workload.kind, kinds)} if kinds else {}),
    }


def _of_kinds(kind: str, kinds: Sequence[str]) -> np.ndarray:
    """1 at a kind's place; equal parts of 1 everywhere where the kind is not told."""
    if not kind:
        return np.full(len(kinds), 1.0 / len(kinds), dtype=np.float32)
    check_known("kind of text", kind, kinds)
    return np.array([float(each == kind) for each in kinds], dtype=np.float32)


def valid_actions(kept: np.ndarray, fits: bool) -> np.ndarray:
    """Which of the n + 1 actions make sense: dropping what is kept until the mask fits, then stopping (the last).

    Args:
        kept: Bits [n].
        fits: Whether the footprint is within the budget.
    """
    done = fits or not kept.any()
    return np.append(kept.astype(bool) & (not done), done)


def _unit_box(size: int) -> spaces.Box:
    return spaces.Box(0.0, 1.0, (size,), np.float32)


def _scalar(value: float) -> np.ndarray:
    return np.array([min(max(value, 0.0), 1.0)], dtype=np.float32)


@functools.lru_cache(maxsize=256)
def _scenario_entries(shape, scenario: Scenario) -> tuple[dict[str, np.ndarray], float]:
    """Entries that no mask changes, and the footprint with every component dropped, both relative to the dense one."""
    workload = scenario.workload
    weights, kv_bytes_per_token = _costs(shape)
    sizes = weights + kv_bytes_per_token * workload.cached_tokens(shape.attention_window)
    smallest, dense = smallest_bytes(shape, workload), dense_bytes(shape, workload)
    entries = {
        "memory_budget": _scalar(scenario.budget_bytes / dense),
        "batch_size": _scalar(math.log2(workload.batch_size) / math.log2(_LARGEST_BATCH)),
        "sequence_length": _scalar(math.log2(workload.sequence_tokens) / math.log2(shape.context_tokens)),
        "component_bytes": sizes.astype(np.float32) / np.float32(dense),
    }
    return entries, smallest / dense


@functools.lru_cache(maxsize=256)
def _width_entries(shape, scenario: Scenario) -> tuple[dict[str, np.ndarray], float, np.ndarray, int, int]:
    """The same, the relative bytes of each whole site, the dense model's bytes, and the tokens in the KV cache."""
    entries, smallest = _scenario_entries(shape, scenario)
    freed, workload = entries["component_bytes"].astype(np.float64), scenario.workload
    of_sites = np.add.reduceat(freed, _site_parts(shape)[0]).astype(np.float32)
    return entries, smallest, of_sites, dense_bytes(shape, workload), workload.cached_tokens(shape.attention_window)


@functools.lru_cache(maxsize=32)
def _site_parts(shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each site its first component, its parts, and these over the most that a site has."""
    starts = np.array([positions.start for _site, positions in shape.components.sites])
    parts = np.array(shape.components.n_parts)
    return starts, parts, (parts / parts.max()).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _costs(shape) -> tuple[np.ndarray, np.ndarray]:
    """Weight bytes, and KV bytes per token, of every component."""
    weights, kv_bytes_per_token = shape.components.costs
    return np.array(weights, dtype=np.int64), np.array(kv_bytes_per_token, dtype=np.int64)


@functools.lru_cache(maxsize=256)
def _ranks(shape, order: tuple[str, ...]) -> np.ndarray:
    position = {name: index for index, name in enumerate(order)}
    ranks = [position[component.name] for component in shape.components]
    return np.array(ranks, dtype=np.float32) / max(1, len(ranks) - 1)
