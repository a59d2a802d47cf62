"""What each component is worth on its own: the dense model's loss increase when it alone is dropped."""

from rap_env.evaluation.meter import Meter
from rap_env.mask import PruningMask


def single_drop_increases(meter: Meter) -> dict[str, float]:
    """By how much the score falls without each component, by name; negative where the model is better without it.

    Raises:
        SearchExhausted: The token budget does not cover the dense model and one mask for each component.
    """
    dense = PruningMask.all_kept(meter.llm.shape)
    evaluated = meter.evaluate([dense, *map(dense.drop, dense.components)])
    return {
        component.name: evaluated[0].score - evaluation.score
        for component, evaluation in zip(dense.components, evaluated[1:], strict=True)
    }
