"""From one number for each site to widths that meet a memory budget: FastForward's projection, and a nested one."""

import functools
import heapq
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rap_env.errors import InvalidConfig, InvalidMask, check_known
from rap_env.mask import PruningMask
from rap_env.memory.footprint import check_feasible, running_costs, smallest_bytes
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
        fractions = self.fractions(action, len(parts))
        floors = smallest_widths(shape, self.p_min)
        free_bytes = budget_bytes - smallest_bytes(shape, workload)
        if self.kind == NESTED:
            return PruningMask.from_widths(shape, nested_widths(fractions, parts, floors, free_bytes))
        meeting = exact_fractions(fractions, [of_site[-1] for of_site in parts], free_bytes, self.p_min)
        return PruningMask.from_widths(shape, whole_widths(meeting, parts, floors, free_bytes, least_part_bytes(shape)))

    def fractions(self, action: Sequence[float], n_sites: int) -> list[float]:
        """The keep fractions [S] that an action asks for, between `p_min` and 1.

        Raises:
            InvalidMask: There is not exactly one finite number for each site.
        """
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (n_sites,) or not np.isfinite(values).all():
            raise InvalidMask(f"expected {n_sites} finite numbers, one for each site; got {values[:8].tolist()}")
        return np.minimum(np.maximum(_READINGS[self.reading](values), self.p_min), 1.0).tolist()

    def dropping_order(self, shape, action: Sequence[float]) -> list[str]:
        """All component names, the last of the nested projection's order first: what shrinking budgets cost, in turn.

        Raises:
            InvalidMask: There is not exactly one finite number for each site.
        """
        positions = [place for _site, place in shape.components.sites]
        n_parts = [place.stop - place.start for place in positions]
        floors = [smallest_width(n, self.p_min) for n in n_parts]
        entering = nested_order(self.fractions(action, len(positions)), n_parts, floors)
        sites, parts = (column[::-1].tolist() for column in entering)
        return [shape.components[positions[site].start + part].name for site, part in zip(sites, parts, strict=True)]


def smallest_width(n_parts: int, p_min: float) -> int:
    """Parts that a site of several keeps at least; 0 for a site of one part."""
    return math.ceil(p_min * n_parts - 1e-9) if n_parts > 1 else 0


@functools.lru_cache(maxsize=32)
def smallest_widths(shape, p_min: float) -> list[int]:
    """`smallest_width` of each site [S]; not to be changed."""
    return [smallest_width(place.stop - place.start, p_min) for _site, place in shape.components.sites]


@functools.lru_cache(maxsize=32)
def least_part_bytes(shape) -> int:
    """Weight bytes of the smallest part: no part takes less at any workload."""
    return min(shape.components.costs[0])


def site_bytes(shape, cached_tokens: int) -> list[list[int]]:
    """Peak bytes that the first 0, 1, ... parts of each site take, with so many tokens in the KV cache."""
    sites, weights, kv_bytes_per_token = _running_costs(shape)
    with_kv = iter((weights + kv_bytes_per_token * cached_tokens).tolist())
    return [next(with_kv)[:stop] if own is None else own for own, stop in sites]


@functools.lru_cache(maxsize=32)
def _running_costs(shape) -> tuple[list[tuple[list[int] | None, int]], np.ndarray, np.ndarray]:
    """Weight bytes of the first 0, 1, ... parts of each site, and how many numbers these are.

    Of sites with a KV cache the former are None; their weight bytes, and KV bytes per token, are rows of the arrays.
    """
    running = list(zip(*running_costs(shape), strict=True))
    sites = [(None if kv[-1] else weights, len(weights)) for weights, kv in running]
    rows = [row for row in running if row[1][-1]]
    longest = max((len(weights) for weights, _kv in rows), default=0)
    padded = np.array([[column + column[-1:] * (longest - len(column)) for column in row] for row in rows], np.int64)
    padded = padded.reshape(len(rows), 2, longest)
    return sites, padded[:, 0], padded[:, 1]


def exact_fractions(fractions: Sequence[float], sizes: Sequence[int], free_bytes: int, p_min: float) -> list[float]:
    """Keep fractions [S] that together take exactly the free bytes, as far as they may lie between `p_min` and 1.

    Args:
        fractions: Between `p_min` and 1 [S].
        sizes: Bytes of each whole site [S].
        free_bytes: Bytes that all sites may take together.
        p_min: Smallest fraction.
    """
    deficit = free_bytes - sum(map(operator.mul, fractions, sizes))
    if deficit >= 0:
        headroom = sum([(1.0 - fraction) * size for fraction, size in zip(fractions, sizes, strict=True)])
        share = min(1.0, deficit / headroom) if headroom > 0 else 1.0
        return [fraction + (1.0 - fraction) * share for fraction in fractions]
    surplus, meeting = -deficit, []
    for fraction, size in zip(fractions, sizes, strict=True):
        taken = min(surplus, (fraction - p_min) * size)
        surplus -= taken
        meeting.append(fraction - taken / size if size else fraction)
    return meeting


def whole_widths(
    fractions: Sequence[float],
    parts: Sequence[Sequence[int]],
    floors: Sequence[int],
    free_bytes: int,
    least_bytes: int = 0,
) -> list[int]:
    """Keep fractions rounded to whole parts that fit.

    Args:
        fractions: Between 0 and 1 [S].
        parts: Bytes of the first 0, 1, ... parts of each site.
        floors: Parts that each site keeps at least, unless the bytes do not suffice [S].
        free_bytes: Bytes that all sites may take together.
        least_bytes: No part takes less.
    """
    wishes = [fraction * (len(of_site) - 1) for fraction, of_site in zip(fractions, parts, strict=True)]
    rounded = [int(wish + 0.5) for wish in wishes]
    widths = list(map(max, rounded, floors))
    free_bytes -= sum(map(operator.getitem, parts, widths))
    for lowest in (floors, [0] * len(parts)):  # below the floors only when all sites have come down to theirs
        if free_bytes >= 0:
            break
        above = [(wishes[site] - width, site) for site, width in enumerate(widths) if width > lowest[site]]
        heapq.heapify(above)  # what was rounded up most, the first of equals
        while free_bytes < 0 and above:
            site = heapq.heappop(above)[1]
            widths[site] -= 1
            free_bytes += parts[site][widths[site] + 1] - parts[site][widths[site]]
            if widths[site] > lowest[site]:
                heapq.heappush(above, (wishes[site] - widths[site], site))
    if free_bytes < least_bytes:
        return widths
    rounded_down = list(zip(map(operator.sub, widths, wishes), range(len(parts)), strict=True))
    for _excess, site in sorted([one for one in rounded_down if one[0] < 0.0]):
        width = widths[site]
        if width + 1 < len(parts[site]) and (added := parts[site][width + 1] - parts[site][width]) <= free_bytes:
            free_bytes -= added
            widths[site] += 1
    return widths


def nested_widths(
    fractions: Sequence[float], parts: Sequence[Sequence[int]], floors: Sequence[int], free_bytes: int
) -> list[int]:
    """Widths of the longest beginning of `nested_order` that fits; arguments as those of `whole_widths`."""
    counts = [len(of_site) - 1 for of_site in parts]
    sites, places = nested_order(fractions, counts, floors)
    sizes = np.array([above - below for of_site in parts for below, above in pairwise(of_site)], dtype=np.int64)
    in_order = sizes[(np.cumsum(counts) - counts)[sites] + places]
    n_kept = int(in_order.cumsum().searchsorted(free_bytes, side="right"))
    return np.bincount(sites[:n_kept], minlength=len(parts)).tolist()


def nested_order(
    fractions: Sequence[float], n_parts: Sequence[int], floors: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Site and part of all N parts [N], in the order in which they enter while one number t scales all keep fractions.

    Part j = 0, 1, ... of a site with n parts enters where `fraction * t * n` is rounded to j + 1. Parts below the
    floors come first, in the same order.
    """
    counts = np.array(n_parts)
    sites = np.arange(len(counts)).repeat(counts)
    parts = np.arange(len(sites)) - (counts.cumsum() - counts)[sites]
    entering = (parts + 0.5) / (counts * np.array(fractions))[sites]
    order = np.lexsort((entering, parts >= np.array(floors)[sites]))  # of equals the first site's first part
    return sites[order], parts[order]
