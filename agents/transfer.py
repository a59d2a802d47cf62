"""What a width policy of one model says about another: layers are matched by their place in the depth."""

from collections.abc import Sequence

import numpy as np

from rap_env.components import KINDS
from rap_env.errors import PolicyUnreadable
from rap_env.llm.shape import ModelShape
from rap_env.memory.scenario import ScenarioSampler
from rap_env.policies import Policy, WidthPolicy


def transferred_fractions(
    source: Policy, shape: ModelShape, sampler: ScenarioSampler, points: Sequence[Sequence[float]]
) -> np.ndarray:
    """Keep fractions [N, S] that another model's policy asks for, at the same batches, lengths and budget ratios.

    Between the layers of the other model they are interpolated, attentions and MLPs by themselves.

    Args:
        source: The other model's policy.
        shape: Whose S sites are asked about.
        sampler: Of the family.
        points: Of the unit cube, where its contexts lie [N, 3].

    Raises:
        PolicyUnreadable: The policy is not one of widths, but a table, say.
        InfeasibleBudget, InvalidWorkload: The other model can't serve a context.
    """
    if not isinstance(source, WidthPolicy):
        raise PolicyUnreadable(f"expected a policy of widths to begin as; got one of kind {source.kind!r}")
    contexts = [sampler.at(source.shape, point) for point in points]
    asked = np.array([source.fractions(each.workload, each.budget_bytes) for each in contexts])
    fractions = np.empty((len(points), len(shape.sites)))
    for kind in KINDS:
        (theirs,), (ours,) = (np.nonzero([site.kind == kind for site in of.sites]) for of in (source.shape, shape))
        places = (np.arange(len(ours)) + 0.5) / len(ours) * len(theirs) - 0.5  # in layers of the other model
        fractions[:, ours] = [np.interp(places, np.arange(len(theirs)), row) for row in asked[:, theirs]]
    return fractions
