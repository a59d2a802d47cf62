"""What each component is worth on its own: the dense model's loss increase when it alone is dropped."""

from collections.abc import Mapping
from typing import Any

from rap_env.evaluation.meter import Meter
from rap_env.mask import PruningMask


def single_drop_increases(meter: Meter) -> dict[str, float]:
    """By how much the score falls without each component, by name; negative where the model is better without it.

    Raises:
        SearchExhausted: The token budget does not cover the dense model and one mask for each component.
    """
    dense = PruningMask.all_kept(meter.llm.shape)
    return increases_of(meter, {component.name: dense.drop(component) for component in dense.components})


def increases_of(meter: Meter, masks: Mapping[Any, PruningMask]) -> dict[Any, float]:
    """By how much the score of each mask is below the dense model's; negative where it is above.

    Raises:
        SearchExhausted: The token budget does not cover the dense model and the masks.
    """
    dense, *evaluated = meter.evaluate([PruningMask.all_kept(meter.llm.shape), *masks.values()])
    return {key: dense.score - evaluation.score for key, evaluation in zip(masks, evaluated, strict=True)}
