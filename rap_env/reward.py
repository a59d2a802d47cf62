"""The reward: named terms times same-named weights."""

import math
from collections.abc import Mapping

from rap_env.errors import InvalidReward

_LARGEST_EXPONENT = 700.0  # exp(709.8) is the largest float


def overshoot_ratio(peak_bytes: int, budget_bytes: int) -> float:
    """How far a footprint exceeds the memory budget, as a fraction of the budget; 0 when it fits."""
    return max(0.0, peak_bytes / budget_bytes - 1.0)


def perplexity_ratio(score: float, dense_score: float) -> float:
    """Perplexity of the dense model over that of the masked one, where scores are minus a mean loss; 1 for no loss.

    The reward of FastForward (arXiv 2511.18977).
    """
    return math.exp(min(score - dense_score, _LARGEST_EXPONENT))


def weighted_reward(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Sum of `weights[name] * terms[name]` over the weights' names.

    Args:
        terms: Everything that was measured: see `Outcome.reward_terms`.
        weights: The chosen names; a penalty has a negative weight.

    Raises:
        InvalidReward: A weight names no term, or a weighted term is NaN or infinite.
    """
    total = 0.0
    for name, weight in weights.items():
        if name not in terms:
            raise InvalidReward(f"reward weight {name!r} has no term; known terms: {', '.join(sorted(terms))}")
        value = weight * terms[name]
        if not math.isfinite(value):
            raise InvalidReward(f"reward term {name!r} is {terms[name]} with weight {weight}; expected finite numbers")
        total += value
    return total
