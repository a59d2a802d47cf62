"""Builds what a run stands on from its composed config; what an earlier job of this process built is used again."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.evaluators import Halves
from experiments.tracking import Tracker
from rap_env.calibration import Corpus, refuse_contamination, window_kinds
from rap_env.errors import InvalidConfig, InvalidReward
from rap_env.evaluation.evaluator import Evaluator
from rap_env.evaluation.store import ResultStore
from rap_env.llm.embedded import cache_folder
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.windows import check_windows
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.problem import SMOOTH_ACCURACY, PruningProblem
from rap_env.widths.prepare import WidthRecipe, prepare_widths

_SMALLEST = {"seed": 0, "token_budget": 0, "in_flight": 1, "decisions": 0}
_SIZE = ("n_samples", "tokens_per_sample")
_built: dict[str, tuple[str, Any]] = {}  # by name, in the order of building: the JSON of the config, and the part


@dataclass(frozen=True)
class Parts:
    """What neither agent nor seed changes.

    Attributes:
        search: Evaluates masks on the search half, for free: searches get a token budget of their own.
        reports: Evaluate masks on the report halves, by name; the main evaluation's is the first.
        sampler: Draws the scenarios that policies shall serve.
        searched: Scenarios that searches know beforehand.
        reported: Scenarios that are reported on.
        corpus: Calibration text.
        windows: Calibration tokens [N, T].
        window_kinds: Of each its kind of text.
        counts: For records: items that were left out, or could not be checked for overlaps.
    """

    search: PruningProblem
    reports: Mapping[str, PruningProblem]
    sampler: ScenarioSampler
    searched: list[Scenario]
    reported: list[Scenario]
    corpus: Corpus
    windows: torch.Tensor
    window_kinds: Sequence[str]
    counts: Mapping[str, int]


def check_values(config: DictConfig) -> None:
    """Refuses missing values, numbers that no run can use, and empty lists of scenarios, before anything is built.

    Raises:
        InvalidConfig: One was found.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise InvalidConfig(f"{', '.join(missing)}: expected a value; got none. The option's YAML shows how to give it")
    for name, smallest in _SMALLEST.items():
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise InvalidConfig(f"{name}: expected a whole number of at least {smallest}; got {value!r}")
    for half in ("search", "report"):
        for name, value in config.workload[half].items():
            if OmegaConf.is_list(value) and not value:
                raise InvalidConfig(f"workload.{half}.{name}: expected at least one; got none")


def build(config: DictConfig, main: str) -> Parts:
    """Builds everything but the agent; cheap checks come before costly work.

    Args:
        config: The composed config.
        main: Name of its evaluation.

    Raises:
        RapError: Whatever is wrong with the config; see `rap_env.errors`.
    """
    whole = _of_whole_sites(config.model)
    # Ordering parts changes the model: with other text or another recipe it is loaded anew.
    stands_on = [] if whole else [config.widths, config.calibration, config.evaluation]
    llm: SwitchableLLM = _once("model", [config.model, *stands_on], lambda: _load(config.model, whole))
    sampler: ScenarioSampler = instantiate(config.workload.sampler)
    sampler.check(llm.shape)
    evaluations = {main: config.evaluation, **config.report}
    halves = _once("evaluations", evaluations, lambda: _halves(evaluations, llm))
    corpus, windows = _once("calibration", config.calibration, lambda: _calibration(config, halves, llm))
    if not whole:
        _once("widths", config.widths, lambda: _prepare(config, corpus, llm))
    searched, reported = build_contexts(config.workload, llm.shape)
    location = config.store or cache_folder() / "results.db"
    store = _once("store", str(location), lambda: ResultStore(location))
    remote, weights = build_remote(config), plain(config.reward)
    search = PruningProblem(llm, remote(halves[main].search), store, weights)
    reports = {name: PruningProblem(llm, remote(each.report), store, weights) for name, each in halves.items()}
    for problem in (search, *reports.values()):
        _ = problem.meter.tokens_each  # encodes the items: what can't be scored is refused now
    if SMOOTH_ACCURACY in weights and not search.evaluator.right_answers(llm):
        raise InvalidReward(
            f"reward: {SMOOTH_ACCURACY} is the mean probability of right choices, and {search.evaluator.name} has none;"
            " expected reward=loss for a text, or reward=accuracy"
        )
    kinds = window_kinds(corpus, len(windows)) if corpus.kinds else ()
    return Parts(search, reports, sampler, searched, reported, corpus, windows, kinds, halves[main].counts)


def build_llm(config: DictConfig) -> tuple[SwitchableLLM, Corpus | None]:
    """The model alone, as a run of the config has it, and the text that its parts are ordered on; None for whole sites.

    Raises:
        RapError: Whatever is wrong with the config; see `rap_env.errors`.
    """
    whole = _of_whole_sites(config.model)
    llm = _load(config.model, whole)
    if whole:
        return llm, None
    corpus = build_corpus(config, lambda: build_halves(config.evaluation, llm).search_text)
    _prepare(config, corpus, llm)
    return llm, corpus


def build_remote(config: DictConfig) -> Callable[[Evaluator], Evaluator]:
    """What makes an evaluator one whose masks are evaluated by the config's workers; without workers it stays as it is.

    Raises:
        InvalidConfig: The workers have a number that no pool can have.
    """
    if not config.get("workers"):
        return lambda evaluator: evaluator
    from rap_env.evaluation.remote import RemoteEvaluator  # here, for few runs have workers

    stands_on = {name: plain(config[name]) for name in ("model", "widths", "calibration", "evaluation")}
    load = functools.partial(load_for_worker, stands_on)
    workers = _once("workers", [config.workers, stands_on], lambda: instantiate(config.workers, load=load))
    return lambda evaluator: RemoteEvaluator(evaluator, workers) if evaluator.runs_model else evaluator


def load_for_worker(config: Mapping[str, Any]) -> SwitchableLLM:
    """The model as a run of the config has it: called in a worker's process.

    Args:
        config: The parts of a run's config that its model stands on, as plain values.
    """
    return build_llm(OmegaConf.create(dict(config)))[0]


def _of_whole_sites(model: DictConfig) -> bool:
    return model.get("granularity", "block") == "block"  # a table has its parts in order


def _load(model: DictConfig, whole: bool) -> SwitchableLLM:
    """The model; where it has parts they are ordered, and refitted, before it is quantised."""
    return instantiate(model) if whole else instantiate(model, weights="full", kv_cache="full")


def _prepare(config: DictConfig, corpus: Corpus, llm: SwitchableLLM) -> None:
    recipe = WidthRecipe(**{key: value for key, value in plain(config.widths).items() if key not in _SIZE})
    prepare_widths(llm, build_windows(config, corpus, llm, config.calibration.seed, of="widths"), recipe)
    llm.quantise(config.model.weights, config.model.kv_cache)


def _once(name: str, config: Any, build: Callable[[], Any]) -> Any:
    """What this process built under a name from an equal config; else it is built, and what stood on the old one goes.

    Two models at once may be more than the memory holds.
    """
    key = json.dumps({"": config}, default=plain, sort_keys=True)
    if name in _built and _built[name][0] != key:
        for later in list(_built)[list(_built).index(name) :]:
            del _built[later]
    if name not in _built:
        _built[name] = key, build()
    return _built[name][1]


def _halves(evaluations: Mapping[str, DictConfig], llm: SwitchableLLM) -> dict[str, Halves]:
    """The halves of all evaluations, the main one first. Nothing may be searched on that is reported on."""
    halves = {name: build_halves(evaluation, llm) for name, evaluation in evaluations.items()}
    main, *others = halves.values()
    for other in others:
        for searched in (main.search_text, *main.also_searched):
            refuse_contamination(searched, other.reported)
    return halves


def _calibration(config: DictConfig, halves: Mapping[str, Halves], llm: SwitchableLLM) -> tuple[Corpus, torch.Tensor]:
    main, *others = halves.values()
    corpus = build_corpus(config, lambda: main.search_text)
    for texts in (main.held_out, *(other.reported for other in others)):
        refuse_contamination(corpus, texts)
    return corpus, build_windows(config, corpus, llm, config.calibration.seed)


def build_contexts(workload: DictConfig, shape) -> tuple[list[Scenario], list[Scenario]]:
    """The scenarios that a workload's YAML has searches know beforehand, and those that are reported on."""
    searched, reported = (
        call_with(instantiate(half, _partial_=True), shape=shape, generated_tokens=workload.generated_tokens)
        for half in (workload.search, workload.report)
    )
    return searched, reported


def build_halves(evaluation: DictConfig, llm: SwitchableLLM) -> Halves:
    """The search and the report half that an evaluation's YAML describes; some of them need the model."""
    return call_with(instantiate(evaluation, _partial_=True), llm=llm)


def build_corpus(config: DictConfig, search_text: Callable[[], Corpus]) -> Corpus:
    """Calibration text; one source takes the text that is searched on, which is built for that one only."""
    return call_with(instantiate(config.calibration.corpus, _partial_=True), search_text=search_text)


def build_windows(
    config: DictConfig, corpus: Corpus, llm: SwitchableLLM, seed: int, of: str = "calibration"
) -> torch.Tensor:
    """Calibration tokens [N, T], drawn from the corpus as the YAML says.

    Args:
        config: The composed config.
        corpus: What `build_corpus` returned.
        llm: Its tokenizer cuts the text.
        seed: Seed of the draw.
        of: The entry that says how many windows of how many tokens: `"calibration"` or `"widths"`.
    """
    size = [config[of][key] for key in _SIZE]
    check_windows(*size, llm.shape.context_tokens)
    return instantiate(config.calibration.sampling, _partial_=True)(corpus, llm.tokenizer, *size, seed)


def build_tracker(config: DictConfig, folder: Path, choices: Mapping[str, str]) -> Tracker:
    """Where metrics go; trackers take the run's folder, and some the composed config.

    Args:
        config: The composed config.
        folder: The run's.
        choices: Names of the agent and of the workload, which the config does not hold; trackers group runs by them.
    """
    named = {"agent_name": choices["agent"], "context_family": choices["workload"]}
    return call_with(instantiate(config.tracker, _partial_=True), folder=folder, config=plain(config) | named)


def plain(config: DictConfig) -> dict[str, Any]:
    """A config as JSON holds it."""
    return OmegaConf.to_container(config, resolve=True)


def call_with(partial: functools.partial, **offered: Any) -> Any:
    """Calls what a YAML named with those of the offered arguments that it has parameters for.

    Raises:
        InvalidConfig: The YAML has a key that it has no parameter for; an experiment may have brought that along.
    """
    parameters = inspect.signature(partial.func).parameters
    if unknown := sorted(partial.keywords.keys() - parameters.keys()):
        raise InvalidConfig(f"{partial.func.__name__} takes no {', '.join(unknown)}; it takes {', '.join(parameters)}")
    return partial(**{name: value for name, value in offered.items() if name in parameters})
