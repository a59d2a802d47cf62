"""What the masks that a system served with reach on evaluations, weighted by the tokens that each generated."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rap_env.mask import PruningMask
from rap_env.problem import PruningProblem


def scores_at_masks(lines: Sequence[Mapping[str, Any]], problems: Mapping[str, PruningProblem]) -> dict[str, float]:
    """Mean scores, weighted by tokens, of the masks that a system's process told at its end.

    Args:
        lines: That the process wrote.
        problems: By name; their model is in the format that it was loaded in, whatever the system's was.

    Returns:
        By problem; nothing for a system that did not live to tell.
    """
    told = next((line["masks"] for line in lines if line.get("masks")), None)
    if told is None:
        return {}
    widths, tokens = zip(*told, strict=True)
    found = {}
    for name, problem in problems.items():
        masks = [PruningMask.from_widths(problem.shape, each) for each in widths]
        scores = [each.score for each in problem.meter.evaluate(masks)]
        found[name] = float(np.average(scores, weights=tokens))
    return found
