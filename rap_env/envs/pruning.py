"""`rap/Pruning-v0`: choose all keep-bits in one step."""

import numpy as np
from gymnasium import spaces

from rap_env.envs.base import RankedMaskEnv
from rap_env.mask import PruningMask


class PruningEnv(RankedMaskEnv):
    """Prune a large language model for one request batch and one memory budget, in a single step.

    ## Description
    A request batch arrives while the device has only so many bytes left for weights and KV cache. The agent decides
    which components the model keeps; the masked model is then evaluated, by default on the embedded lm-eval tasks.
    Attentions create all of the KV cache and MLPs hold most of the weights, so what is cheapest to give up changes with
    the workload (RAP, arXiv 2505.17138).

    ## Action Space
    `MultiBinary(n)`: one bit for each component in the model's order (attention and MLP of layer 0, of layer 1, ...);
    1 keeps the component, 0 drops it. Anything else raises `InvalidMask`.

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
    Sum of weights times same-named terms; by default `accuracy - 5 overshoot`. Terms: `accuracy` (the evaluator's
    score: on tasks the mean accuracy, on text minus the mean loss), `smooth_accuracy` (mean probability of the right
    choices; not on text), `overshoot` (bytes above the budget / budget), `violation` (1 if above the budget). The
    problem's `reward_weights` choose among them, and `info["reward_terms"]` carries them all.

    ## Starting State
    A scenario drawn from the sampler, every component kept. `reset(options={"scenario": Scenario(...)})` sets it.

    ## Episode End
    Every episode terminates after its one step; none is truncated. A step that the problem's token budget does not pay
    for raises `SearchExhausted`.

    ## Information
    `scenario`, `mask`, `footprint` (parts in bytes), `overshoot_bytes`, and after the step `tasks` (metrics of each
    task), `reward_terms`, `seconds` (that the evaluation took when it was measured), and `outcome`, which also tells
    whether the result came from the store (equality ignores that).

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
        self.action_space = spaces.MultiBinary(len(self.shape.components))

    def act(self, action: np.ndarray) -> tuple[bool, bool]:
        self._mask = PruningMask.from_bits(self.shape, action)
        return True, False
