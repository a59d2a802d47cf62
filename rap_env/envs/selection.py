"""`rap/Selection-v0`: after each layer of a reranker, who of the candidates leaves; on recorded scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded

from rap_env.errors import InvalidConfig, check_known
from rap_env.rerank.budgets import Budgets
from rap_env.rerank.cuts import CUTS
from rap_env.rerank.features import N_FEATURES, Features
from rap_env.rerank.outcomes import outcome
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.selection import Decision, Selection, check_decision, replay
from rap_env.rerank.synthetic import synthetic_paths
from rap_env.reward import weighted_reward

REWARD_WEIGHTS = {"agreement": 1.0, "compute": -0.1}
TOP_KS = (1, 5, 10)
_REQUEST, _BUDGETS = ("query", "top_k"), ("compute", "memory")  # options of `reset`


class _Given:
    """Decides as it was told."""

    decision = Decision()

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        return self.decision


class SelectionEnv(gymnasium.Env):
    """Find the best K of a query's candidates without reading all of them with all layers of a reranker.

    ## Description
    A request asks for the best K of n candidates. A reranker reads them together, layer by layer, and scores them after
    each layer. Then some may be selected, some dropped, and the others are read on; whoever is left after the last
    layer is ranked by its scores. Scores were recorded before (`ScorePaths`), so no model is run, and an episode is
    what `replay` makes of the same decisions.

    ## Action Space
    `Discrete(14)`: a number of `rap_env.rerank.cuts.CUTS`. 0 goes on with everybody; 1 ends the request with the best
    by the present scores; 2 to 5 drop, 6 to 9 select, and 10 to 13 do both, with margins of 0.25, 0.5, 1 and 2 usual
    spreads of the layer's scores: dropped is who lies a margin below the last candidate that would have a place, and
    selected who lies a margin above the first one without. If just as many would be read on as there are open places,
    they are selected, and the request ends. Every action is valid at any time. `decide` takes any other decision.

    ## Observation Space
    A `Box` of 23 numbers in [0, 1], from what a `Decider` is told and the request's budgets: see
    `rap_env.rerank.features.Features`, whose table names them. Zeros once the request has ended.

    ## Rewards
    At the end, 0 before: the sum of weights times same-named terms, `agreement` 1 and `compute` -0.1.

    - `agreement`: share of the K candidates that the full model returns.
    - `compute`: layers that were run for each candidate, weighted by its tokens, over those of the full model.

    ## Starting State
    A query and a K, drawn from all pairs with fewer places than candidates, after the first layer.
    `reset(options={"query": 3, "top_k": 5})` chooses one of them, by the query's place in the paths; both are given.
    `options={"compute": 0.5, "memory": 0.4}` gives the episode `Budgets`, as shares of all layers of all candidates and
    of all candidates; without, there are none.

    ## Episode End
    Terminated when nobody is read on: at the latest one decision before the last layer, for that needs none. Where the
    next layer would go beyond a budget, the request ends with the best by the present scores, whatever was decided.

    ## Information
    `reward_terms`, `query` (its name), `top_k`, `layer` (the last that was run), `n_live` (candidates that are read on)
    and `ids` (numbers of those that have a place, those selected first in front).

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `paths` | synthetic ones | the `ScorePaths` |
    | `top_ks` | 1, 5, 10 | which K are drawn |
    | `spreads` | those of the paths | the usual spread of scores after each layer, in which margins and gaps are told |
    | `reward_weights` | as above | a weight for each chosen term |

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        paths: ScorePaths | None = None,
        top_ks: Sequence[int] = TOP_KS,
        spreads: np.ndarray | None = None,
        reward_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.paths = synthetic_paths() if paths is None else paths
        self.spreads = self.paths.spreads() if spreads is None else np.asarray(spreads, float)
        if self.spreads.shape != (self.paths.n_layers,) or not (self.spreads > 0).all():
            raise InvalidConfig(f"spreads: expected {self.paths.n_layers} positive numbers; got {self.spreads}")
        self.reward_weights = dict(REWARD_WEIGHTS if reward_weights is None else reward_weights)
        weighted_reward(dict.fromkeys(REWARD_WEIGHTS, 0.0), self.reward_weights)  # refuses names that are no terms
        sizes = [len(tokens) for tokens in self.paths.tokens]
        self._requests = [(query, k) for query, size in enumerate(sizes) for k in top_ks if 0 < k < size]
        if not self._requests:
            raise InvalidConfig(f"top_ks: expected one from 1 to less than {max(sizes)} candidates; got {top_ks}")
        self.action_space = spaces.Discrete(len(CUTS))
        self.observation_space = spaces.Box(0.0, 1.0, (N_FEATURES,), np.float32)
        self.selection: Selection | None = None
        self.layer = 0

    @property
    def scores(self) -> np.ndarray:
        """Of the live candidates after the last layer that was run [n]."""
        return self.paths.scores[self._query][self.layer, list(self.selection.active)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if options:
            for name in options:
                check_known("option", name, (*_REQUEST, *_BUDGETS))
        if options and set(options) & set(_REQUEST):
            request = options.get("query"), options.get("top_k")
            if request not in self._requests:
                raise InvalidConfig(
                    f"expected a query from 0 to {len(self.paths.queries) - 1} and one of the K with more candidates"
                    f" than places; got query={request[0]}, top_k={request[1]}"
                )
        else:
            request = self._requests[int(self.np_random.integers(len(self._requests)))]
        self._query, self._top_k = request
        n_candidates = len(self.paths.tokens[self._query])
        self._given = _Given()
        self.selection = Selection(n_candidates, self._top_k, self.paths.n_layers, self._given)
        budgets = Budgets(**{name: float(value) for name, value in (options or {}).items() if name in _BUDGETS})
        self._features = Features(self.spreads, n_candidates, self._top_k, budgets)
        self.layer = 0
        return self._observe(), self._info(dict.fromkeys(REWARD_WEIGHTS, 0.0))

    def step(self, action):
        self._check_running()
        number = action.item() if isinstance(action, np.generic | np.ndarray) else action
        if not isinstance(number, int) or not 0 <= number < len(CUTS):
            raise InvalidAction(f"expected a number from 0 to {len(CUTS) - 1}; got {action!r}")
        return self.decide(CUTS[number].decision(self._seen, self.selection.n_open, self.spreads[self.layer]))

    def decide(self, decision: Decision):
        """A step with any decision on the live candidates; returns what `step` returns.

        Raises:
            RankingFailed: It is no decision on them.
        """
        self._check_running()
        check_decision(decision, len(self._seen), self.selection.n_open)
        decision = self._features.affordable(decision, self._seen, self.selection.n_open)
        self._given.decision = decision
        self.selection.after(self.layer, self._seen)
        self._features.narrow(decision)
        if self.selection.active:
            self.layer += 1
            if self.layer == self.paths.n_layers - 1:
                self.selection.after(self.layer, self.scores)
        terms, ended = dict.fromkeys(REWARD_WEIGHTS, 0.0), not self.selection.active
        if ended:
            path, tokens = self.paths.scores[self._query], self.paths.tokens[self._query]
            full_ids = replay(path, None, self._top_k).ids
            came_to = outcome(self.selection.ranking, full_ids, tokens, len(path))
            terms = {name: getattr(came_to, name) for name in terms}
        seen = np.zeros(N_FEATURES, np.float32) if ended else self._observe()
        return seen, weighted_reward(terms, self.reward_weights), ended, False, self._info(terms)

    def _check_running(self) -> None:
        if self.selection is None or not self.selection.active:
            raise ResetNeeded("there is no running episode: call reset before the next step")

    def _observe(self) -> np.ndarray:
        self._seen = self.scores
        return self._features.observe(self.layer, self._seen, self.selection.n_open)

    def _info(self, terms: Mapping[str, float]) -> dict[str, Any]:
        return {
            "reward_terms": terms,
            "query": self.paths.queries[self._query],
            "top_k": self._top_k,
            "layer": self.layer,
            "n_live": len(self.selection.active),
            "ids": self.selection.ranking.ids,
        }
