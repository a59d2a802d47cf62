"""`rap/SequentialPruning-v0`: drop one component at a time, then stop."""

import numpy as np
from gymnasium import spaces

from rap_env.envs.base import RankedMaskEnv
from rap_env.errors import InvalidMask
from rap_env.observation import valid_actions


class SequentialPruningEnv(RankedMaskEnv):
    """Prune a large language model for one request batch and one memory budget, one component at a time.

    ## Description
    As in `rap/Pruning-v0`, but the agent drops one component in each step and sees what is left, as
    RAP's controller does (arXiv 2505.17138). When it stops, the masked model is evaluated.

    ## Action Space
    `Discrete(n + 1)`: action i < n drops component i, action n stops. `action_masks()` allows dropping what is kept
    until the footprint is within the budget, and only stopping from then on. The environment itself takes any action of
    the space: naming a dropped component changes nothing, and stopping above the budget ends the episode and pays for
    the overshoot. Anything else raises `InvalidMask`.

    ## Observation Space
    A `Dict`; every entry lies in [0, 1].

    | entry | size | unit |
    |---|---|---|
    | `memory_budget` | 1 | budget bytes / dense footprint bytes for this workload |
    | `batch_size` | 1 | log2(sequences) / log2(1024) |
    | `sequence_length` | 1 | log2(tokens of a sequence) / log2(context tokens) |
    | `gsi_ranking` | n | rank of each component, 0 least and 1 most important |
    | `kept` | n | bits, 1 for each kept component |
    | `footprint` | 1 | bytes of the present mask / dense footprint bytes |
    | `component_bytes` | n | bytes that dropping each component frees / dense footprint bytes |

    ## Rewards
    0 until the episode ends, then the sum of weights times same-named terms of `rap/Pruning-v0`.

    ## Starting State
    A scenario drawn from the sampler, every component kept. `reset(options={"scenario": Scenario(...)})` sets it.

    ## Episode End
    Terminates when the agent stops or nothing is left to drop; truncated after 2 n steps. In both cases the mask is
    evaluated; where the problem's token budget does not pay for it, the step raises `SearchExhausted`.

    ## Information
    `scenario`, `mask`, `footprint` (parts in bytes), `overshoot_bytes`, and after the last step `tasks` (metrics of
    each task), `reward_terms`, `seconds` (that the evaluation took when it was measured), and `outcome`, which also
    tells whether the result came from the store (equality ignores that).

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `problem` | embedded model and tasks | the `PruningProblem` that evaluates masks |
    | `importance` | greedy sequential importance on packaged text | the `ImportanceSource` of the ranking |
    | `sampler` | 1 to 16 sequences of 128 to 2048 tokens, 60% to 95% of the dense bytes | draws scenarios |
    | `gsi` | `"static"` | `"current"` measures the ranking anew for the present mask; the source needs a `Meter` |
    | `evaluation` | `"embedded"` | what `problem` and `importance` are by default; `"table"` needs no model |
    | `render_mode` | `None` | `"ansi"` or `"rgb_array"` |

    ## Version History
    * v0: first version.
    """

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.action_space = spaces.Discrete(len(self.shape.components) + 1)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self._steps = 0
        return super().reset(seed=seed, options=options)

    def action_masks(self) -> np.ndarray:
        """Booleans [n + 1], for MaskablePPO."""
        fits = self._footprint().peak_bytes <= self.scenario.budget_bytes
        return valid_actions(np.array(self._mask.keep), fits)

    def act(self, action: int) -> tuple[bool, bool]:
        components = self.shape.components
        action = action.item() if isinstance(action, np.generic | np.ndarray) else action
        if not isinstance(action, int) or not 0 <= action <= len(components):  # -1 would name the last component
            raise InvalidMask(f"expected an action from 0 to {len(components)}; got {action!r}")
        self._steps += 1
        if action < len(components):
            self._mask = self._mask.drop(components[action])
        terminated = action == len(components) or not self._mask.kept
        return terminated, not terminated and self._steps >= 2 * len(components)
