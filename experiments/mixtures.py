"""Masks searched by several evaluations at once: reported on by one of them, or each on contexts of its own kind."""

import itertools
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from experiments.evaluators import Halves
from experiments.recipes.build import build_halves
from rap_env.calibration import Corpus, refuse_contamination
from rap_env.errors import InvalidConfig, check_known
from rap_env.evaluation.mixture import KindsEvaluator, MixtureEvaluator
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
    halves = _halves(llm, parts, [reported, *sorted(parts.keys() - {reported})])
    main, *others = halves.values()
    return Halves(
        search=MixtureEvaluator([(each.search, weights[name]) for name, each in halves.items()]),
        report=main.report,
        search_text=main.search_text,
        reported=main.reported,
        held_out=_named({name: each.held_out for name, each in halves.items()}),
        repeated_items=sum(each.repeated_items for each in halves.values()),
        also_searched=tuple(each.search_text for each in others),
    )


def kind_halves(llm: SwitchableLLM, kinds: Mapping[str, DictConfig]) -> Halves:
    """Kinds of text, for workloads that tell theirs: an evaluation of a mask tells about all of them.

    Calibration text that is cut from what masks are searched on is of all kinds, and each document knows its own.

    Args:
        llm: Its tokenizer cuts text.
        kinds: What other YAMLs of conf/evaluation hold, by the names of the kinds.

    Raises:
        InvalidReward: There is no kind.
        ContaminationFound: One kind is searched on what another one reports on.
        RapError: Whatever the kinds raise.
    """
    halves = _halves(llm, kinds, sorted(kinds))
    texts = {name: each.search_text for name, each in halves.items()}
    return Halves(
        search=KindsEvaluator({name: each.search for name, each in halves.items()}),
        report=KindsEvaluator({name: each.report for name, each in halves.items()}),
        search_text=Corpus(
            ", ".join(text.name for text in texts.values()),
            tuple(document for text in texts.values() for document in text.documents),
            tuple(name for name, text in texts.items() for _document in text.documents),
        ),
        reported=_named({name: each.reported for name, each in halves.items()}),
        held_out=_named({name: each.held_out for name, each in halves.items()}),
        repeated_items=sum(each.repeated_items for each in halves.values()),
    )


def _halves(llm: SwitchableLLM, parts: Mapping[str, DictConfig], names: Sequence[str]) -> dict[str, Halves]:
    halves = {name: build_halves(parts[name], llm) for name in names}
    for one, other in itertools.permutations(halves.values(), 2):
        refuse_contamination(one.search_text, other.reported)
    return halves


def _named(texts: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Sequence[str]]:
    """Texts of several parts together, each with its part's name in front of its own."""
    return {f"{part}: {name}": of for part, each in texts.items() for name, of in each.items()}
