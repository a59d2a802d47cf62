"""From one number for each site to widths that meet a memory budget: FastForward's projection, and a nested one."""

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rap_env.errors import InvalidConfig, InvalidMask, check_known
from rap_env.mask import PruningMask
from rap_env.memory.footprint import check_feasible, smallest_bytes
from rap_env.memory.workload import Workload

EXACT, NESTED = "exact", "nested"
_READINGS = {"magnitude": np.abs, "affine": lambda values: (values + 1.0) / 2.0}


@dataclass(frozen=True)
class Projection:
    """Turns an action into a mask that fits, of which each site keeps the first parts.

    Bytes are those of a footprint at a workload. One of a single token makes the KV cache vanish, and the budget
    one of parameters, as in FastForward (arXiv 2511.18977).

    Keep fractions are `clip(|action|, p_min, 1)` in the paper, the reading "magnitude". An action and its opposite are
    the same there, so that a broad symmetric policy, as SAC's, has no reason to move its mean away from 0; "affine"
    reads -1 to 1 as 0 to 1 instead.

    **exact** is the paper's way to meet a budget: bytes that they leave over are spread over
    the sites by their headroom, bytes that they take too many are taken from the sites in order, each down to `p_min`;
    then they are rounded to whole parts. What rounding took too many is given back, the part that was rounded up most
    first, and, beyond the paper, what it left over is used, the part that was rounded down most first.

    **nested** scales all keep fractions by one number, as large as the budget allows. Parts therefore enter in an order
    that the action alone decides, and the mask is the longest beginning of this order that fits: of two budgets, and of
    two workloads, one mask is a subset of the other.

    Every site keeps at least `ceil(p_min * parts)` of its parts unless the budget does not pay for them. A site with
    one part can only be kept or dropped: its fraction is rounded at 0.5, and it may be dropped.

    Shapes: S sites.

    Attributes:
        kind: `"exact"` or `"nested"`.
        p_min: Smallest keep fraction of a site.
        reading: `"magnitude"` or `"affine"`.

    Raises:
        UnknownName: No such kind or reading.
        InvalidConfig: `p_min` is not above 0, or above 1.
    """

    kind: str = EXACT
    p_min: float = 0.1
    reading: str = "magnitude"

    def __post_init__(self) -> None:
        check_known("projection", self.kind, (EXACT, NESTED))
        check_known("reading of actions", self.reading, _READINGS)
        if not 0.0 < self.p_min <= 1.0:
            raise InvalidConfig(f"p_min: expected a fraction above 0 and at most 1; got {self.p_min}")

    def mask(self, shape, action: Sequence[float], workload: Workload, budget_bytes: int) -> PruningMask:
        """The mask of an action.

        Args:
            shape: The model's `ModelShape`.
            action: A number for each site [S], in the order in which the model runs them.
            workload: The request batch.
            budget_bytes: Bytes that weights and KV cache may take.

        Raises:
            InvalidMask: There is not exactly one finite number for each site.
            InfeasibleBudget: No mask can meet the budget.
        """
        check_feasible(shape, workload, budget_bytes)
        parts = site_bytes(shape, workload.cached_tokens(shape.attention_window))
        counts, floors = part_counts(shape), smallest_widths(shape, self.p_min)
        fractions = self.fractions(action, len(counts))
        free_bytes = budget_bytes - smallest_bytes(shape, workload)
        if self.kind == NESTED:
            widths = nested_widths(fractions, parts, counts, floors, free_bytes)
        else:
            fractions = exact_fractions(fractions, parts[:, -1], free_bytes, self.p_min)
            widths = whole_widths(fractions, parts, counts, floors, free_bytes, least_part_bytes(shape))
        return PruningMask.from_widths(shape, widths.tolist())

    def fractions(self, action: Sequence[float], n_sites: int) -> np.ndarray:
        """The keep fractions [S] that an action asks for, between `p_min` and 1.

        Raises:
            InvalidMask: There is not exactly one finite number for each site.
        """
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (n_sites,) or not np.isfinite(values).all():
            raise InvalidMask(f"expected {n_sites} finite numbers, one for each site; got {values[:8].tolist()}")
        return np.minimum(np.maximum(_READINGS[self.reading](values), self.p_min), 1.0)

    def dropping_order(self, shape, action: Sequence[float]) -> list[str]:
        """All component names, the last of the nested projection's order first: what shrinking budgets cost, in turn.

        Raises:
            InvalidMask: There is not exactly one finite number for each site.
        """
        counts, starts = part_counts(shape), [place.start for _site, place in shape.components.sites]
        sites, parts = nested_order(self.fractions(action, len(counts)), counts, smallest_widths(shape, self.p_min))
        return [shape.components[position].name for position in (np.array(starts)[sites] + parts)[::-1].tolist()]


def smallest_width(n_parts: int, p_min: float) -> int:
    """Parts that a site of several keeps at least; 0 for a site of one part."""
    return math.ceil(p_min * n_parts - 1e-9) if n_parts > 1 else 0


@functools.lru_cache(maxsize=32)
def part_counts(shape) -> np.ndarray:
    """How many parts each site has [S]; not to be changed."""
    return np.array(shape.components.n_parts)


@functools.lru_cache(maxsize=32)
def smallest_widths(shape, p_min: float) -> np.ndarray:
    """`smallest_width` of each site [S]; not to be changed."""
    return np.array([smallest_width(n_parts, p_min) for n_parts in part_counts(shape).tolist()])


@functools.lru_cache(maxsize=32)
def least_part_bytes(shape) -> int:
    """Weight bytes of the smallest part: no part takes less at any workload."""
    return min(shape.components.costs[0])


def site_bytes(shape, cached_tokens: int) -> np.ndarray:
    """Peak bytes that the first 0, 1, ... parts of each site take, with so many tokens in the KV cache [S, W + 1].

    W is the most parts that a site has. One with fewer has the bytes of all of them in the last columns.
    """
    weights, kv_bytes_per_token = _running_costs(shape)
    return weights + kv_bytes_per_token * cached_tokens


@functools.lru_cache(maxsize=32)
def _running_costs(shape) -> tuple[np.ndarray, np.ndarray]:
    """Weight bytes, and KV bytes per token, of the first 0, 1, ... parts of each site [S, W + 1]."""
    longest = int(part_counts(shape).max()) + 1
    weights, kv_bytes_per_token = (
        np.array([of_site + of_site[-1:] * (longest - len(of_site)) for of_site in of], dtype=np.int64)
        for of in shape.components.running_costs
    )
    return weights, kv_bytes_per_token


def exact_fractions(fractions: np.ndarray, sizes: np.ndarray, free_bytes: int, p_min: float) -> np.ndarray:
    """Keep fractions [S] that together take exactly the free bytes, as far as they may lie between `p_min` and 1.

    Args:
        fractions: Between `p_min` and 1 [S].
        sizes: Bytes of each whole site [S].
        free_bytes: Bytes that all sites may take together.
        p_min: Smallest fraction.
    """
    surplus = float(fractions @ sizes) - free_bytes
    if surplus <= 0.0:
        headroom = float((1.0 - fractions) @ sizes)
        share = min(1.0, -surplus / headroom) if headroom > 0.0 else 1.0
        return fractions + (1.0 - fractions) * share
    above = (fractions - p_min) * sizes
    taken = np.minimum(np.maximum(surplus - above.cumsum() + above, 0.0), above)  # from the first sites on
    return fractions - taken / np.maximum(sizes, 1)


def whole_widths(
    fractions: np.ndarray, parts: np.ndarray, counts: np.ndarray, floors: np.ndarray, free_bytes: int, least_bytes: int
) -> np.ndarray:
    """Keep fractions rounded to whole parts that fit [S].

    Args:
        fractions: Between 0 and 1 [S].
        parts: What `site_bytes` returns [S, W + 1].
        counts: Parts of each site [S].
        floors: Parts that each site keeps at least, unless the bytes do not suffice [S].
        free_bytes: Bytes that all sites may take together.
        least_bytes: No part takes less.
    """
    sites, wishes = np.arange(len(counts)), fractions * counts
    widths = np.maximum((wishes + 0.5).astype(np.int64), floors)
    free_bytes -= int(parts[sites, widths].sum())
    for share in (1, 0):  # below the floors only when all sites have come down to theirs
        if free_bytes >= 0:
            break
        lowest = share * floors
        above = (widths > lowest).nonzero()[0]
        rounded_up = list(zip((wishes - widths)[above].tolist(), above.tolist(), strict=True))
        heapq.heapify(rounded_up)  # what was rounded up most, the first of equals
        while free_bytes < 0 and rounded_up:
            site = heapq.heappop(rounded_up)[1]
            width = widths[site] = widths[site] - 1
            free_bytes += int(parts[site, width + 1] - parts[site, width])
            if width > lowest[site]:
                heapq.heappush(rounded_up, (float(wishes[site] - width), site))
    if free_bytes < least_bytes:
        return widths
    rounded_down = ((wishes > widths) & (widths < counts)).nonzero()[0]
    rounded_down = rounded_down[(widths - wishes)[rounded_down].argsort(kind="stable")]  # what was rounded down most
    kept = widths[rounded_down]
    added = parts[rounded_down, kept + 1] - parts[rounded_down, kept]
    for site, size in zip(rounded_down.tolist(), added.tolist(), strict=True):
        if free_bytes < least_bytes:
            break
        if size <= free_bytes:
            free_bytes -= size
            widths[site] += 1
    return widths


def nested_widths(
    fractions: np.ndarray, parts: np.ndarray, counts: np.ndarray, floors: np.ndarray, free_bytes: int
) -> np.ndarray:
    """Widths of the longest beginning of `nested_order` that fits [S]; arguments as those of `whole_widths`."""
    sites, places = nested_order(fractions, counts, floors)
    in_order = parts[sites, places + 1] - parts[sites, places]
    n_kept = int(in_order.cumsum().searchsorted(free_bytes, side="right"))
    return np.bincount(sites[:n_kept], minlength=len(counts))


def nested_order(fractions: np.ndarray, counts: np.ndarray, floors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Site and part of all N parts [N], in the order in which they enter while one number t scales all keep fractions.

    Part j = 0, 1, ... of a site with n parts enters where `fraction * t * n` is rounded to j + 1. Parts below the
    floors come first, in the same order. Arguments as those of `whole_widths`.
    """
    sites = np.arange(len(counts)).repeat(counts)
    parts = np.arange(len(sites)) - (counts.cumsum() - counts)[sites]
    entering = (parts + 0.5) / (counts * fractions)[sites]
    order = np.lexsort((entering, parts >= floors[sites]))  # of equals the first site's first part
    return sites[order], parts[order]
