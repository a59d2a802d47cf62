"""Compares how much two ways to prune candidates compute where they agree with the full model equally often."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rap_env.errors import InvalidConfig
from rap_env.rerank.outcomes import replayed
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.selection import Decider

_RESAMPLES = 2_000


@dataclass(frozen=True)
class Outcomes:
    """Of some deciders (settings of a rule, or seeds of a training) on the same queries, each [deciders, queries].

    Attributes:
        agreement: Share of the full model's best K.
        executions: Layers times candidates, over those of the full model.
        compute: The same, weighted by tokens.
    """

    agreement: np.ndarray
    executions: np.ndarray
    compute: np.ndarray

    def means(self) -> dict[str, float]:
        """Over all deciders and queries."""
        return {name: float(values.mean()) for name, values in vars(self).items()}

    def part(self, places: Sequence[int]) -> "Outcomes":
        """Those of some deciders."""
        return Outcomes(*(values[list(places)] for values in vars(self).values()))


def outcomes(paths: ScorePaths, deciders: Sequence[Decider], top_k: int) -> Outcomes:
    """What each decider comes to on each query with more than K candidates.

    Raises:
        InvalidConfig: There is no such query.
    """
    similarities = paths.similarities or [None] * len(paths.queries)
    columns = zip(paths.scores, paths.tokens, similarities, strict=True)
    requests = [row for row in columns if len(row[1]) > top_k]
    if not requests:
        raise InvalidConfig(f"expected queries with more than {top_k} candidates; there are none")
    rows = [
        [replayed(path, tokens, decider, top_k, similar) for path, tokens, similar in requests] for decider in deciders
    ]
    return Outcomes(
        *(
            np.array([[getattr(one, name) for one in row] for row in rows])
            for name in ("agreement", "executions", "compute")
        )
    )


def cheapest(found: Outcomes, target: float) -> tuple[int, bool]:
    """The decider with the least compute whose mean agreement reaches a target, and whether there is one.

    Without one it is that with the highest agreement.
    """
    agreement, compute = found.agreement.mean(axis=1), found.compute.mean(axis=1)
    reaching = np.flatnonzero(agreement >= target)
    if len(reaching):
        return int(reaching[np.argmin(compute[reaching])]), True
    return int(np.argmax(agreement)), False


def frontier(agreement: np.ndarray, compute: np.ndarray) -> list[int]:
    """Settings that neither another one nor a coin toss between two others beats, the cheapest first.

    Args:
        agreement: Mean of each setting [settings].
        compute: Mean of each setting [settings].
    """
    kept: list[int] = []

    def slope(first: int, second: int) -> float:
        return (compute[second] - compute[first]) / (agreement[second] - agreement[first])

    for place in np.lexsort((-agreement, compute)).tolist():
        if kept and agreement[place] <= agreement[kept[-1]]:
            continue
        while len(kept) > 1 and slope(kept[-2], kept[-1]) >= slope(kept[-2], place):
            kept.pop()
        kept.append(place)
    return kept


def compute_at(agreement: np.ndarray, compute: np.ndarray, wanted: float) -> float:
    """The least mean compute at which some settings, or coin tosses between two, agree so often.

    Reading everything is one of the settings. Where even the cheapest one agrees more often, its compute is taken.

    Args:
        agreement: Mean of each setting [settings].
        compute: Mean of each setting [settings].
        wanted: The agreement.
    """
    agreement, compute = np.append(agreement, 1.0), np.append(compute, 1.0)
    order = frontier(agreement, compute)
    return float(np.interp(wanted, agreement[order], compute[order]))


def matched_difference(own: Outcomes, rule: Outcomes, n_resamples: int = _RESAMPLES) -> dict[str, float]:
    """Compute of a learner minus that of a rule at the learner's agreement, with its 95% bootstrap interval.

    Each resample draws seeds and queries anew, the same queries for both, and matches the agreement anew.

    Args:
        own: Of the seeds of a training.
        rule: Of the rule's settings, on the same queries.
        n_resamples: How many.

    Returns:
        `mean`, `low` and `high` of the difference, and `rule_compute`, which is compared with.
    """
    rng = np.random.default_rng(0)
    n_seeds, n_queries = own.agreement.shape
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples) / n_seeds
    queries = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), size=n_resamples) / n_queries
    of_own = [np.einsum("rs,sq,rq->r", seeds, values, queries) for values in (own.agreement, own.compute)]
    of_rule = [queries @ values.T for values in (rule.agreement, rule.compute)]
    drawn = [
        compute - compute_at(agreements, computes, agreement)
        for agreement, compute, agreements, computes in zip(*of_own, *of_rule, strict=True)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    means = rule.agreement.mean(axis=1), rule.compute.mean(axis=1)
    rule_compute = compute_at(*means, float(own.agreement.mean()))
    return {
        "mean": float(own.compute.mean()) - rule_compute,
        "low": float(low),
        "high": float(high),
        "rule_compute": rule_compute,
    }
