"""What is checked about the rows of a leaderboard: contexts and bytes by arithmetic, losses by measuring some again."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.leaderboard.rows import mask_of, name_of, scenarios_of
from experiments.recipes.build import build_contexts, build_halves
from experiments.recipes.recorded import changes_since, rebuilt_model
from rap_env.errors import CorpusUnavailable, InvalidConfig, InvalidMask, UnknownName
from rap_env.evaluation.evaluator import Evaluator
from rap_env.evaluation.meter import Meter
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario

TOLERANCE = 0.02  # nats; processors round bfloat16 differently, and accuracies have differed by 0.011
SAMPLE, SEED = 2, 0  # masks of each row and seed that are measured again, and the seed that they are drawn by


@dataclass(frozen=True)
class Rebuilt:
    """What a leaderboard's losses were measured with, built again.

    Attributes:
        llm: The model, its parts in order.
        report: Measures losses on the report text.
        windows: Digest of its windows.
        changes: Why the model is not to the last bit what it was; empty where it is.
    """

    llm: SwitchableLLM
    report: Evaluator
    windows: str
    changes: str


@dataclass(frozen=True)
class Sampled:
    """A loss that a row states, and how to measure it again.

    Attributes:
        where: Row, seed and context, for messages.
        mask: The masked model.
        loss: What the row states, in nats for each token.
    """

    where: str
    mask: PruningMask
    loss: float


@dataclass(frozen=True)
class Checked:
    """What came of the checks.

    Attributes:
        faults: In words; none where all is right.
        n_footprints: Masks whose bytes were compared with their budgets.
        n_measured: Losses that were measured again.
        largest_difference: Of these from what the rows state, in nats.
    """

    faults: list[str]
    n_footprints: int
    n_measured: int
    largest_difference: float


def overridden(config: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """A recorded config with other values for some of its entries, as a rule the folders of texts.

    Args:
        config: The record's.
        overrides: `KEY=VALUE` each, as on the command line of runs.

    Raises:
        InvalidConfig: The config has no such entry, or this is not the form.
    """
    changed = OmegaConf.create(copy.deepcopy(dict(config)))
    OmegaConf.set_struct(changed, True)
    try:
        for override in overrides:
            if "=" not in override:
                raise InvalidConfig(f"expected KEY=VALUE, for example evaluation.report_paths=[FILE]; got {override!r}")
            changed.merge_with(OmegaConf.from_dotlist([override]))
    except OmegaConfBaseException as error:
        raise InvalidConfig(f"expected an entry of the row's config; {override!r} is none") from error
    return changed


def rebuild(record: Mapping[str, Any], overrides: Sequence[str], source: Path) -> Rebuilt:
    """Model and report of a run's record, or of a leaderboard's row; text that was searched on is checked as for runs.

    Args:
        record: Says how both are built.
        overrides: Where the texts lie.
        source: The file that holds the record, for messages.

    Raises:
        ContaminationFound: The text that was searched on shares 13 words in a row with what is reported on.
        InvalidConfig: The report is not by text.
        RapError: Whatever the config names is not to be had.
    """
    config = overridden(record["config"], overrides)
    try:
        llm, corpus = rebuilt_model(config, source)
        report = build_halves(config.evaluation, llm).report
    except CorpusUnavailable as error:
        raise CorpusUnavailable(
            f"{error}; say where the texts lie: evaluation.search_paths=[FILE] evaluation.report_paths=[FILE]"
        ) from error
    if "windows" not in report.identity:
        raise InvalidConfig(f"expected a report by text, whose windows have a digest; {source} reports {report.name}")
    return Rebuilt(llm, report, report.identity["windows"], changes_since(record["provenance"], llm, corpus))


def check(
    rows: Sequence[Mapping[str, Any]],
    rebuilt: Rebuilt,
    sample: int = SAMPLE,
    seed: int = SEED,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Checks rows of one family: contexts and bytes of all, losses of some.

    Args:
        rows: What `check_rows` has passed.
        rebuilt: Of one of them.
        sample: Masks of each row and seed whose losses are measured again; the dense model's is as well.
        seed: Of the draw.
        tolerance: How far a loss may be from what a row states, in nats.
        progress: Called with (masks measured, all masks).

    Raises:
        InvalidConfig: The report windows are not those that the rows were measured on.
    """
    stated = rows[0]["results"]["report_windows"]
    if rebuilt.windows != stated:
        raise InvalidConfig(
            f"expected the report text that the rows were measured on, windows with the digest {stated[:12]}; those of"
            f" this text have {rebuilt.windows[:12]}: evaluation.report_paths names other files"
        )
    faults = [f"{name_of(row)}: {fault}" for row in rows for fault in _arithmetic(row, rebuilt.llm.shape)]
    samples = [] if faults else _drawn(rows, rebuilt.llm.shape, sample, np.random.default_rng(seed))
    meter, measured = Meter(rebuilt.llm, rebuilt.report), {}
    for done, mask in enumerate(masks := list(dict.fromkeys(each.mask for each in samples))):
        progress(done, len(masks))
        measured[mask] = -meter.evaluate([mask])[0].score
    differences = [abs(measured[each.mask] - each.loss) for each in samples]
    faults += [
        f"{each.where}: the row states a loss of {each.loss:.4f}, measured again it is {measured[each.mask]:.4f};"
        f" they may differ by {tolerance}"
        for each, difference in zip(samples, differences, strict=True)
        if not difference <= tolerance  # so that NaN is a fault too
    ]
    n_footprints = sum(len(of_seed) for row in rows for of_seed in row["results"]["contexts"])
    return Checked(faults, n_footprints, len(samples), max(differences, default=0.0))


def _arithmetic(row: Mapping[str, Any], shape) -> Iterator[str]:
    """What is wrong with a row's contexts, budgets and masks."""
    results = row["results"]
    searched, reported = build_contexts(OmegaConf.create(row["config"]["workload"]), shape)
    if scenarios_of(row) != reported:
        yield f"expected the {len(reported)} contexts that its config describes; it reports on others"
    if known := set(searched) & set(reported):
        yield f"{len(known)} of its contexts were searched on; held-out contexts are what a leaderboard is about"
    for seed, tokens in zip(results["seeds"], results["tokens"], strict=True):
        if tokens > results["token_budget"]:
            yield f"seed {seed} has spent {tokens:,} tokens, more than its token budget"
    for seed, contexts in zip(results["seeds"], results["contexts"], strict=True):
        for number, (context, scenario) in enumerate(zip(contexts, scenarios_of(row), strict=True), 1):
            if fault := _over_budget(context, scenario, shape):
                yield f"seed {seed}, context {number}: {fault}"
                break  # one of a seed says enough


def _over_budget(context: Mapping[str, Any], scenario: Scenario, shape) -> str:
    try:
        needed = footprint(shape, mask_of(context, shape), scenario.workload).peak_bytes
    except (InvalidMask, UnknownName) as error:
        return str(error)
    if needed <= scenario.budget_bytes:
        return ""
    return f"its mask needs {needed:,} bytes; the budget is {scenario.budget_bytes:,}"


def _drawn(rows: Sequence[Mapping[str, Any]], shape, sample: int, generator: np.random.Generator) -> list[Sampled]:
    """The dense model and some masks of each row and seed."""
    drawn = []
    for row in rows:
        results = row["results"]
        for seed, dense, contexts in zip(results["seeds"], results["dense_loss"], results["contexts"], strict=True):
            where = f"{name_of(row)}, seed {seed}"
            drawn.append(Sampled(f"{where}, dense model", PruningMask.all_kept(shape), dense))
            for place in sorted(generator.choice(len(contexts), min(sample, len(contexts)), replace=False).tolist()):
                mask = mask_of(contexts[place], shape)
                drawn.append(Sampled(f"{where}, context {place + 1}", mask, contexts[place]["loss"]))
    return drawn
