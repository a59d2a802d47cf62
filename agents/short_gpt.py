"""ShortGPT, as an agent: what turns the residual stream least goes first (arXiv 2403.03853)."""

import time

from agents.base import SearchResult, Task
from rap_env.errors import UnknownName
from rap_env.importance.block_influence import block_influence
from rap_env.mask import by_layer
from rap_env.policies import OrderPolicy

_GRANULARITIES = {"layer": by_layer, "block": lambda components: [(component,) for component in components]}


class ShortGptAgent:
    """Orders parts of the model by their block influence, from one forward of the calibration windows.

    Both components of a layer follow each other in the order. The walk along it ends, and refills, by components as for
    every order, so that the last layer may go by half: better for ShortGPT than whole layers would be.

    Args:
        granularity: `"layer"` as in the paper, or `"block"` for attentions and MLPs apart.

    Raises:
        UnknownName: No such granularity.
    """

    def __init__(self, granularity: str) -> None:
        if granularity not in _GRANULARITIES:
            raise UnknownName("granularity", granularity, _GRANULARITIES)
        self._divide = _GRANULARITIES[granularity]

    def search(self, task: Task) -> SearchResult:
        started = time.perf_counter()
        problem = task.problem
        parts = self._divide(problem.shape.components)
        influences = block_influence(problem.llm, task.windows, parts)
        ranked = sorted(zip(influences, parts, strict=True))
        policy = OrderPolicy(problem.shape, [component.name for _influence, part in ranked for component in part])
        details = {"block_influence": influences}
        return SearchResult(policy, 0, time.perf_counter() - started, details, calibration_tokens=task.windows.numel())
