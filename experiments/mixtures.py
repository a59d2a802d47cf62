"""Masks searched by several evaluations at once, and reported on by one of them."""

import itertools
from collections.abc import Mapping

from omegaconf import DictConfig

from experiments.evaluators import Halves
from experiments.recipes.build import build_halves
from rap_env.calibration import refuse_contamination
from rap_env.errors import InvalidConfig, check_known
from rap_env.evaluation.mixture import MixtureEvaluator
from rap_env.llm.switchable import SwitchableLLM


def mixed_halves(
    llm: SwitchableLLM, parts: Mapping[str, DictConfig], weights: Mapping[str, float], reported: str
) -> Halves:
    """A search half that adds up those of several evaluations; the report half is that of one part.

    Calibration text that is cut from what masks are searched on is that part's as well. The order in which parts are
    told does not matter, for a record has them in another one.

    Args:
        llm: Its tokenizer cuts text.
        parts: What other YAMLs of conf/evaluation hold, by a name of their own.
        weights: What a unit of each part's score is worth, by the same names.
        reported: The part that is reported on.

    Raises:
        InvalidConfig: Weights and parts have other names.
        UnknownName: No part has the name of the reported one.
        InvalidReward: There are fewer than two parts, or a weight is not above 0.
        ContaminationFound: One part is searched on what another one reports on.
        RapError: Whatever the parts raise.
    """
    if parts.keys() != weights.keys():
        raise InvalidConfig(f"evaluation.weights: expected those of {', '.join(parts)}; got {', '.join(weights)}")
    check_known("part of the evaluation", reported, parts)
    names = [reported, *sorted(parts.keys() - {reported})]
    halves = {name: build_halves(parts[name], llm) for name in names}
    for one, other in itertools.permutations(halves.values(), 2):
        refuse_contamination(one.search_text, other.reported)
    main, *others = halves.values()
    return Halves(
        search=MixtureEvaluator([(each.search, weights[name]) for name, each in halves.items()]),
        report=main.report,
        search_text=main.search_text,
        reported=main.reported,
        held_out={f"{name}: {text}": of for name, each in halves.items() for text, of in each.held_out.items()},
        repeated_items=sum(each.repeated_items for each in halves.values()),
        also_searched=tuple(each.search_text for each in others),
    )
