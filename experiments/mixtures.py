"""Masks searched by several evaluations at once, and reported on by the first of them."""

import itertools
from collections.abc import Mapping

from omegaconf import DictConfig

from experiments.evaluators import Halves
from experiments.recipes.build import build_halves
from rap_env.calibration import refuse_contamination
from rap_env.errors import InvalidConfig
from rap_env.evaluation.mixture import MixtureEvaluator
from rap_env.llm.switchable import SwitchableLLM


def mixed_halves(llm: SwitchableLLM, parts: Mapping[str, DictConfig], weights: Mapping[str, float]) -> Halves:
    """A search half that adds up those of several evaluations; the report half is the first one's.

    Calibration text that is cut from what masks are searched on is the first one's as well.

    Args:
        llm: Its tokenizer cuts text.
        parts: What other YAMLs of conf/evaluation hold, by a name of their own.
        weights: What a unit of each part's score is worth, by the same names.

    Raises:
        InvalidConfig: Weights and parts have other names.
        InvalidReward: There are fewer than two parts, or a weight is not above 0.
        ContaminationFound: One part is searched on what another one reports on.
        RapError: Whatever the parts raise.
    """
    if parts.keys() != weights.keys():
        raise InvalidConfig(f"evaluation.weights: expected those of {', '.join(parts)}; got {', '.join(weights)}")
    halves = {name: build_halves(part, llm) for name, part in parts.items()}
    for one, other in itertools.permutations(halves.values(), 2):
        refuse_contamination(one.search_text, other.reported)
    first, *others = halves.values()
    return Halves(
        search=MixtureEvaluator([(each.search, weights[name]) for name, each in halves.items()]),
        report=first.report,
        search_text=first.search_text,
        reported=first.reported,
        held_out={name: texts for each in halves.values() for name, texts in each.held_out.items()},
        repeated_items=sum(each.repeated_items for each in halves.values()),
        also_searched=tuple(each.search_text for each in others),
    )
