"""`rap/Width-v0`: choose the widths of all sites in one step."""

import numpy as np
from gymnasium import spaces

from rap_env.envs.base import MaskEnv
from rap_env.memory.projection import Projection
from rap_env.observation import observe_widths, width_observation_space


class WidthEnv(MaskEnv):
    """Prune a large language model for one request batch and one memory budget: a width for each site, in one step.

    ## Description
    As in `rap/Pruning-v0`, but the agent says how much of each site, the attention or the MLP of a layer, the model
    keeps; which parts these are is the order of parts inside the site. A projection turns the numbers into widths that
    fit the budget, so that nothing has to be learned about it (FastForward, arXiv 2511.18977).

    ## Action Space
    `Box(-1, 1, (S,), float32)`: a number for each of the S sites in the model's order (attention and MLP of layer 0, of
    layer 1, ...). Its absolute value, at least `p_min`, is the fraction of the site's parts that the agent asks for, so
    that larger bounds would add nothing; these are the ones that SAC and TD3 squash their actions into. Finite numbers
    beyond them count as the bounds. Anything but S finite numbers raises `InvalidMask`.

    ## Observation Space
    A `Dict`; every entry lies in [0, 1].

    | entry | size | unit |
    |---|---|---|
    | `memory_budget` | 1 | budget bytes / dense footprint bytes for this workload |
    | `batch_size` | 1 | log2(sequences) / log2(1024) |
    | `sequence_length` | 1 | log2(tokens of a sequence) / log2(context tokens) |
    | `footprint` | 1 | bytes of the present mask / dense footprint bytes |
    | `site_bytes` | S | bytes that dropping each whole site frees / dense footprint bytes |
    | `site_parts` | S | parts of each site / parts of the site with the most |
    | `widths` | S | kept parts of each site / its parts |

    With a sampler of K kinds of text there is `kind` as well (K): 1 at the workload's, and 0 elsewhere.

    ## Rewards
    The sum of weights times same-named terms of `rap/Pruning-v0`. With a weight of the term `perplexity_ratio`, the
    reward of FastForward, the dense model is evaluated as well: exp(score - dense score).

    ## Starting State
    A scenario drawn from the sampler, every part kept. `reset(options={"scenario": Scenario(...)})` sets it.

    ## Episode End
    Every episode terminates after its one step; none is truncated. A step that the problem's token budget does not pay
    for raises `SearchExhausted`.

    ## Information
    `scenario`, `mask`, `footprint` (parts in bytes), `overshoot_bytes` (0 after the step), and after the step `tasks`
    (metrics of each task), `reward_terms`, `seconds` (that the evaluation took when it was measured), and `outcome`,
    which also tells whether the result came from the store (equality ignores that).

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `problem` | embedded model and tasks | the `PruningProblem` that evaluates masks |
    | `sampler` | 1 to 16 sequences of 128 to 2048 tokens, 60% to 95% of the dense bytes | draws scenarios |
    | `projection` | `"exact"` | `"nested"` gives masks of one action that are subsets of one another |
    | `p_min` | 0.1 | smallest keep fraction of a site, unless the budget does not pay for it |
    | `reading` | `"magnitude"` | `"affine"` reads -1 to 1 as fractions from 0 to 1 instead of absolute values |
    | `evaluation` | `"embedded"` | what `problem` is by default; `"table"` (docs/table.md) needs no model |
    | `render_mode` | `None` | `"ansi"` or `"rgb_array"` |

    ## Version History
    * v0: first version.
    """

    def __init__(self, projection: str = "exact", p_min: float = 0.1, reading: str = "magnitude", **arguments) -> None:
        self.projection = Projection(projection, p_min, reading)
        super().__init__(**arguments)
        n_sites = len(self.shape.components.sites)
        self.action_space = spaces.Box(-1.0, 1.0, (n_sites,), np.float32)
        self.observation_space = width_observation_space(self.shape, self.sampler.kinds)

    def act(self, action: np.ndarray) -> tuple[bool, bool]:
        scenario = self.scenario
        values = np.asarray(action, dtype=np.float64).ravel()
        self._mask = self.projection.mask(self.shape, values, scenario.workload, scenario.budget_bytes)
        return True, False

    def _observe(self) -> dict[str, np.ndarray]:
        return observe_widths(self.shape, self.scenario, self._mask, self.sampler.kinds)
