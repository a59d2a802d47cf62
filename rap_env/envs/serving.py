"""`rap/Serving-v0`: requests are served under a memory budget that moves; the level is chosen again and again."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded

from rap_env.errors import InvalidConfig, check_known
from rap_env.reward import weighted_reward
from rap_env.serving.episodes import Episode, Setting, draw_episode
from rap_env.serving.jobs import Counts, Targets, reward_terms
from rap_env.serving.simulated import Simulation
from rap_env.serving.tables import ServingTable, embedded_table

TRAINING_SEEDS = 2**30  # episode seeds below are drawn; those from it on are for whoever evaluates
REWARD_WEIGHTS = {"served": 1.0, "refused": -0.5, "forced": -0.1, "switches": -0.1}
_LOWEST_OF, _RATE_OF = 8, 40  # decisions
_MOST_WAITING, _MOST_PROMPT_TOKENS, _MOST_RATE, _LONGEST_SECONDS = 64, 8192, 4.0, 10.0


class ServingEnv(gymnasium.Env):
    """Serve requests with a model that can be pruned, while memory is taken away and given back.

    ## Description
    A queue of requests is served with continuous batching, as `rap_env.serving.Engine` does, by a simulation whose
    steps take the seconds that a `ServingTable` tells; no model is run. Weights and KV cache share a budget that moves.
    A smaller level of the table leaves more room for sequences and is faster, and its tokens are worth less. A decision
    holds until the first step that ends at least `decide_seconds` later.

    ## Action Space
    `Discrete(n)`: the level to run with, 0 for the dense model. If it does not hold what is in flight, or the first
    request that waits where nothing is, the largest level that does is taken, now and whenever the budget falls before
    the next decision; each time counts as forced. If none does, sequences give their caches up and are read again.

    ## Observation Space
    A `Box` of 10 + 3 n numbers in [0, 1], `budget_change` in [-1, 1], in this order; all are clipped.

    | entry | size | unit |
    |---|---|---|
    | `budget` | 1 | budget bytes / (2 * whole), which is what the dense model takes with `whole_tokens` cached |
    | `lowest_budget` | 1 | the lowest of the last 8 decisions, in the same unit |
    | `budget_change` | 1 | budget now minus that of 7 decisions ago / whole |
    | `needed` | n | bytes that each level takes with the caches in flight / (2 * budget) |
    | `wanted` | n | 1/2 + 5 * (bytes that each level takes once all that waits is in flight / budget - 1) |
    | `level` | n | bits, 1 for the present one |
    | `since_switch` | 1 | seconds since the level changed / 10 |
    | `running` | 1 | sequences in flight / most that there may be |
    | `waiting` | 1 | log2(1 + requests that wait) / log2(1 + 64) |
    | `reserved_tokens` | 1 | tokens that caches in flight are reserved for / (2 * `whole_tokens`) |
    | `unread_tokens` | 1 | log2(1 + prompt tokens that are still to be read) / log2(1 + 8192) |
    | `longest_wait` | 1 | seconds that the first request in the queue has waited / target of the first token |
    | `arrival_rate` | 1 | requests a second over the last 40 decisions / 4 |

    ## Rewards
    Sum of weights times same-named terms of the step, `served` 1, `refused` -0.5, `forced` -0.1, `switches` -0.1:

    - `served`: for each request that ended in time, the sum over its tokens of exp(-loss over dense of the level that
      generated it), which is the ratio of perplexities; over the tokens that all requests of the episode want. In time
      is a request whose first token came within `first_token_seconds`, and whose other tokens came within
      `token_seconds` each on the mean.
    - `refused`: tokens wanted by requests that were refused, over the same.
    - `forced`, `switches`: how often, over the decisions of an episode.

    A return lies below 1, which only a dense model that is always in time would reach.

    ## Starting State
    An episode drawn from the setting, at time 0, with the dense model. `reset(options={"episode_seed": 5})` chooses
    which one; drawn are those below 2**30. `reset(options={"episode": Episode(...)})` sets it.

    ## Episode End
    Truncated when the episode's duration is over: the requests of a service do not end, so nothing terminates. What is
    in flight then is not paid.

    ## Information
    `reward_terms`, `counts` (what happened since the beginning: see `Counts`), `seconds` of the episode, `level`,
    `budget_bytes`, and `episode_seed`, None where the episode was given.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `table` | as measured on the embedded model | the `ServingTable` |
    | `setting` | 60 seconds, 0.5 to 2.5 requests a second, 0.4 of the whole up to all of it | draws episodes |
    | `targets` | 2 seconds, 0.2 for each further token | when a request is in time, and when it is refused |
    | `reward_weights` | as above | a weight for each chosen term |
    | `decide_seconds` | 0.25 | how long a decision holds at least |
    | `render_mode` | `None` | `"ansi"` |

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(
        self,
        table: ServingTable | None = None,
        setting: Setting | None = None,
        targets: Targets | None = None,
        reward_weights: Mapping[str, float] | None = None,
        decide_seconds: float = 0.25,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None:
            check_known("render mode", render_mode, self.metadata["render_modes"])
        if not 0.0 < decide_seconds < math.inf:
            raise InvalidConfig(f"decide_seconds: expected a positive number; got {decide_seconds}")
        self.table, self.setting, self.targets = table or embedded_table(), setting or Setting(), targets or Targets()
        self.whole_bytes = self.table.needed_bytes(0, self.setting.whole_tokens)
        self.reward_weights = dict(REWARD_WEIGHTS if reward_weights is None else reward_weights)
        self.decide_seconds, self.render_mode = decide_seconds, render_mode
        weighted_reward(dict.fromkeys(REWARD_WEIGHTS, 0.0), self.reward_weights)  # refuses names that are no terms
        n_levels = len(self.table.levels)
        self.action_space = spaces.Discrete(n_levels)
        low = np.zeros(10 + 3 * n_levels, np.float32)
        low[2] = -1.0  # the change of the budget
        self.observation_space = spaces.Box(low, np.ones_like(low))
        self.simulation: Simulation | None = None
        self.n_decisions = 0
        self._episode_seed: int | None = None
        self._is_running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        options = options or {}
        episode: Episode | None = options.get("episode")
        self._episode_seed = options.get("episode_seed") if episode is None else None
        if episode is None:
            if self._episode_seed is None:
                self._episode_seed = int(self.np_random.integers(TRAINING_SEEDS))
            episode = draw_episode(self._episode_seed, self.setting)
        self.simulation = Simulation(self.table, episode, self.whole_bytes, self.targets)
        self.n_decisions = math.ceil(episode.duration_seconds / self.decide_seconds)
        self._budgets = deque([self.simulation.budget_bytes], _LOWEST_OF)
        self._arrived = deque([(0.0, 0)], _RATE_OF + 1)
        self._is_running = True
        return self._observe(), self._info(self._terms(Counts()))

    def step(self, action):
        if not self._is_running:
            raise ResetNeeded("there is no running episode: call reset before the next step")
        level = action.item() if isinstance(action, np.generic | np.ndarray) else action
        if not isinstance(level, int) or not 0 <= level < len(self.table.levels):
            raise InvalidAction(f"expected a level from 0 to {len(self.table.levels) - 1}; got {action!r}")
        simulation = self.simulation
        before = simulation.counts.copied()
        simulation.advance(level, simulation.now + self.decide_seconds)
        self._budgets.append(simulation.budget_bytes)
        self._arrived.append((simulation.now, simulation.counts.arrived))
        terms = self._terms(before)
        truncated = simulation.now >= simulation.episode.duration_seconds
        self._is_running = not truncated
        return self._observe(), weighted_reward(terms, self.reward_weights), False, truncated, self._info(terms)

    def _terms(self, before: Counts) -> dict[str, float]:
        """What the reward is made of, since some counts."""
        now = self.simulation.counts
        return reward_terms(before, now, self.simulation.episode.offered_tokens, self.n_decisions)

    def _observe(self) -> np.ndarray:
        simulation, budgets = self.simulation, self._budgets
        n_levels, budget, whole = len(self.table.levels), max(1, simulation.budget_bytes), 2 * self.whole_bytes
        (began, arrived_before), (_, arrived) = self._arrived[0], self._arrived[-1]
        rate = (arrived - arrived_before) / max(simulation.now - began, self.decide_seconds)
        waiting, wanted = simulation.waiting, simulation.wanted_tokens
        waited = simulation.now - waiting[0].arrived_seconds if waiting else 0.0
        levels = [0.0] * n_levels
        levels[simulation.level] = 1.0
        values = [
            simulation.budget_bytes / whole,
            min(budgets) / whole,
            max(-1.0, (budgets[-1] - budgets[0]) / self.whole_bytes),
            *(simulation.needed_bytes(level) / (2 * budget) for level in range(n_levels)),
            *(
                max(0.0, 0.5 + 5.0 * (self.table.needed_bytes(level, wanted) / budget - 1.0))
                for level in range(n_levels)
            ),
            *levels,
            (simulation.now - simulation.switched_seconds) / _LONGEST_SECONDS,
            simulation.n_running / self.table.max_batch,
            math.log2(1 + len(waiting)) / math.log2(1 + _MOST_WAITING),
            simulation.reserved_tokens / (2 * self.setting.whole_tokens),
            math.log2(1 + simulation.unread_tokens) / math.log2(1 + _MOST_PROMPT_TOKENS),
            waited / self.targets.first_token_seconds,
            rate / _MOST_RATE,
        ]
        return np.minimum(np.array(values, np.float32), 1.0)

    def _info(self, terms: Mapping[str, float]) -> dict[str, Any]:
        simulation = self.simulation
        return {
            "reward_terms": terms,
            "counts": vars(simulation.counts).copy(),
            "seconds": simulation.now,
            "level": simulation.level,
            "budget_bytes": simulation.budget_bytes,
            "episode_seed": self._episode_seed,
        }

    def render(self) -> str | None:
        if self.render_mode is None or self.simulation is None:
            return None
        one, counts = self.simulation, self.simulation.counts
        return (
            f"{one.now:7.2f} s  {self.table.levels[one.level].name:>8}"
            f"  {one.needed_bytes(one.level) / 1e6:8,.1f} of {one.budget_bytes / 1e6:8,.1f} MB"
            f"  {one.n_running:3} running {len(one.waiting):3} waiting"
            f"  {counts.in_time} in time, {counts.served - counts.in_time} late, {counts.refused} refused\n"
        )
