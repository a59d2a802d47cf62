"""What a policy sees of a request: a vector of fixed size, from the scores alone."""

import numpy as np

from rap_env.rerank.budgets import UNLIMITED, Budgets
from rap_env.rerank.cuts import STOP
from rap_env.rerank.selection import Decision

N_GAPS = 4  # candidates on either side of the border
N_FEATURES = 2 * N_GAPS + 15
_WIDEST = 4.0  # spreads


class Features:
    """Features of one request, layer by layer: `observe` once a layer, then `narrow` with what was decided.

    They hold nothing but what a `Decider` is told, so that a policy learned on them runs in a reranker. All are clipped
    to [0, 1]. A unit is the spread of scores that is usual at the layer; the border lies between the last candidate
    with an open place and the first one without.

    | entry | size | meaning |
    |---|---|---|
    | `above` | 4 | how far the last 4 with a place are above the border, the nearest first / (4 units); 1 if missing |
    | `below` | 4 | how far the first 4 without a place are below it, the same |
    | `spread` | 1 | standard deviation of the live candidates' scores / (4 units) |
    | `variation` | 1 | standard deviation / absolute mean, which the published rule looks at |
    | `mean` | 1 | 1/2 + (mean minus border) / (8 units) |
    | `live` | 1 | live candidates / all |
    | `open` | 1 | open places / live candidates |
    | `top_k` | 1 | K / all candidates |
    | `layer` | 1 | layers that were run / all |
    | `moved` | 1 | share of the open places that others would have had by the scores of the layer before |
    | `unchanged` | 1 | layers in a row without such a change / all layers |
    | `displaced` | 1 | mean places by which live candidates moved since the layer before / live candidates |
    | `drift` | 1 | standard deviation of what the scores, in units, changed by since the layer before / 4 |
    | `spent` | 1 | candidates that were run, summed over layers / (all candidates * all layers) |
    | `ahead` | 1 | candidates that are run if all live ones are read to the end, over the same |
    | `compute_left` | 1 | share of the budget for compute that is left; 1 without one |
    | `memory_left` | 1 | share of the budget for memory that the live candidates leave; 1 without one |

    Args:
        spreads: The unit of each layer [layers], positive.
        n_candidates: All candidates of the request.
        top_k: K, less than these.
        budgets: Of the request.
    """

    def __init__(self, spreads: np.ndarray, n_candidates: int, top_k: int, budgets: Budgets = UNLIMITED) -> None:
        self._budgets = budgets
        self._spreads, self._n_candidates, self._top_k = spreads, n_candidates, top_k
        self._scores = self._before = None  # in units: of this layer, and of the one before for who is live now
        self._unchanged = self._executions = 0

    def observe(self, layer: int, scores: np.ndarray, n_open: int) -> np.ndarray:
        """The features [23] after a layer.

        Args:
            layer: That was run, counted from 0.
            scores: Of the live candidates [n].
            n_open: Open places, from 1 to n.
        """
        values = scores / self._spreads[layer]
        order = np.argsort(-values, kind="stable")
        ranked, n, n_layers = values[order], len(values), len(self._spreads)
        border = 0.5 * (ranked[n_open - 1] + ranked[n_open]) if n > n_open else ranked[-1]
        gaps = np.full(2 * N_GAPS, _WIDEST)
        above, below = ranked[:n_open][::-1][:N_GAPS] - border, border - ranked[n_open : n_open + N_GAPS]
        gaps[: len(above)], gaps[N_GAPS : N_GAPS + len(below)] = above, below
        mean, spread = float(values.mean()), float(values.std())
        moved, displaced, drift = self._changes(values, order, n_open)
        self._unchanged = self._unchanged + 1 if moved == 0.0 and self._before is not None else 0
        self._executions += n
        self._scores = values
        whole = self._n_candidates * n_layers
        others = [
            spread / _WIDEST,
            spread / max(abs(mean), 1e-9),
            0.5 + (mean - float(border)) / (2 * _WIDEST),
            n / self._n_candidates,
            n_open / n,
            self._top_k / self._n_candidates,
            (layer + 1) / n_layers,
            moved,
            self._unchanged / n_layers,
            displaced,
            drift / _WIDEST,
            self._executions / whole,
            n * (n_layers - layer - 1) / whole,
            *self._budgets.left(self._executions / whole, n / self._n_candidates),
        ]
        return np.clip(np.concatenate([gaps / _WIDEST, others]), 0.0, 1.0).astype(np.float32)

    def affordable(self, decision: Decision, scores: np.ndarray, n_open: int) -> Decision:
        """The decision; where the next layer would go beyond a budget, one that ends the request.

        Args:
            decision: On the live candidates.
            scores: Theirs, as they were observed [n].
            n_open: Open places.
        """
        n_read, n_layers = len(decision.deferred), len(self._spreads)
        spent = (self._executions + n_read) / (self._n_candidates * n_layers)
        if n_read and not self._budgets.allow(spent, n_read / self._n_candidates):
            return STOP.decision(scores, n_open, 1.0)
        return decision

    def narrow(self, decision: Decision) -> None:
        """Goes on with those who are read on."""
        self._before = self._scores[sorted(decision.deferred)]

    def _changes(self, values: np.ndarray, order: np.ndarray, n_open: int) -> tuple[float, float, float]:
        """`moved`, `displaced`, and `drift` in units; zeros after the first layer."""
        if self._before is None:
            return 0.0, 0.0, 0.0
        n, places, places_before = len(values), np.empty(len(values)), np.empty(len(values))
        order_before = np.argsort(-self._before, kind="stable")
        places[order] = places_before[order_before] = np.arange(n)
        moved = np.count_nonzero((places < n_open) & (places_before >= n_open)) / n_open
        return moved, float(np.abs(places - places_before).mean()) / n, float((values - self._before).std())
