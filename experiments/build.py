"""Builds the parts of an experiment from a composed config."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from agents.base import Task
from experiments.evaluators import Halves
from experiments.tracking import Tracker
from rap_env.calibration import Corpus, refuse_contamination
from rap_env.errors import RapError, UnknownName
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import ImportanceRanking, greedy_sequential_importance
from rap_env.importance.source import ImportanceSource
from rap_env.importance.trials import RemovalMeter
from rap_env.llm.embedded import cache_folder
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.windows import check_windows
from rap_env.memory.scenario import Scenario, ScenarioSampler, scenario_grid
from rap_env.problem import EvaluationBudget, PruningProblem


@dataclass(frozen=True)
class Parts:
    """What every experiment stands on.

    Attributes:
        search: Judges masks on the search half.
        report: Judges masks on the report half.
        further: Judges masks on the report halves of further evaluations, by name.
        sampler: Scenarios to train for.
        told: Scenarios that agents are told, for searches of one scenario after another.
        grid: Scenarios to report on; those that agents are told, unless `workload.told` names others.
        corpus: Calibration text.
        windows: Tokens [N, T] of it.
        ranking: Static importance.
        importance: The same as environments take it.
    """

    search: PruningProblem
    report: PruningProblem
    further: dict[str, PruningProblem]
    sampler: ScenarioSampler
    told: list[Scenario]
    grid: list[Scenario]
    corpus: Corpus
    windows: torch.Tensor
    ranking: ImportanceRanking
    importance: ImportanceSource

    def task(
        self,
        seed: int,
        folder: Path,
        progress: Callable[[int, int], None],
        log: Callable[[int, dict[str, float]], None],
        budget: EvaluationBudget,
    ) -> Task:
        """What an agent is given, with an evaluation budget of its own."""
        problem = self.search.with_budget(budget)
        return Task(
            problem, self.importance, self.sampler, self.told, self.windows, seed, folder, progress=progress, log=log
        )


def build(
    config: DictConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    further: Mapping[str, DictConfig] | None = None,
) -> Parts:
    """Builds everything but the agent; cheap checks come before costly measurements.

    Args:
        config: The composed config.
        progress: Called with (rounds done, rounds in all) of the importance ranking.
        further: Configs of further evaluations to report on.

    Raises:
        RapError: Whatever is wrong with the config; see `rap_env.errors`.
    """
    llm: SwitchableLLM = instantiate(config.model)
    sampler: ScenarioSampler = instantiate(config.workload.sampler)
    sampler.check(llm.shape)
    scenarios = (config.workload.get("told", config.workload.report), config.workload.report)
    told, grid = (scenario_grid(llm.shape, each.workloads, each.budget_ratios) for each in scenarios)
    halves = build_halves(config.evaluation, llm)
    others = {name: build_halves(evaluation, llm) for name, evaluation in (further or {}).items()}
    corpus = build_corpus(config, halves.search_text)
    refuse_contamination(corpus, halves.held_out)
    for other in others.values():
        refuse_contamination(halves.search_text, other.reported)
        refuse_contamination(corpus, other.reported)
    store = ResultStore(config.store or cache_folder() / "results.db")
    calibration = config.calibration
    windows = build_windows(config, corpus, llm, calibration.seed)
    weights = plain(config.reward)
    search = PruningProblem(llm, halves.search, store, weights)
    report = PruningProblem(llm, halves.report, store, weights)
    reports = {name: PruningProblem(llm, other.report, store, weights) for name, other in others.items()}
    ranking = greedy_sequential_importance(llm, windows, calibration.removals, calibration.exact, store, progress)
    importance = ImportanceSource(ranking.order, RemovalMeter(llm, windows, store), ranking.known)
    return Parts(search, report, reports, sampler, told, grid, corpus, windows, ranking, importance)


def build_halves(evaluation: DictConfig, llm: SwitchableLLM) -> Halves:
    """The search and the report half that an evaluation's YAML describes; some of them need the model."""
    return call_with(instantiate(evaluation, _partial_=True), llm=llm)


def build_corpus(config: DictConfig, search_text: Corpus) -> Corpus:
    """Calibration text; one source takes the text that is searched on."""
    source = instantiate(config.calibration.corpus, _partial_=True)
    return call_with(source, search_text=search_text)


def build_tracker(config: DictConfig, folder: Path) -> Tracker:
    """Where metrics go; trackers take the run's folder, and some the composed config."""
    return call_with(instantiate(config.tracker, _partial_=True), folder=folder, config=plain(config))


def agent_config(name: str, settings: Mapping[str, Any] | None = None) -> DictConfig:
    """An agent's YAML with some of its values replaced.

    Args:
        name: Of the YAML, or any name for a variant.
        settings: Values; of a variant also `like`, the name of the YAML that it differs from.

    Raises:
        UnknownName: The YAML has no such value.
        MissingConfigException: There is no such YAML; the message lists those that there are.
    """
    changes = dict(settings or {})
    config = compose("config", overrides=[f"agent={changes.pop('like', name)}"]).agent
    for key in changes:
        if key not in config:
            raise UnknownName(f"setting of agent {name!r}", key, config)
    return OmegaConf.merge(config, changes)


def plain(config: DictConfig) -> dict[str, Any]:
    """A config as JSON holds it."""
    return OmegaConf.to_container(config, resolve=True)


@contextlib.contextmanager
def refusing_in_one_line() -> Iterator[None]:
    """Ends the program with one line, and no traceback, for whatever its user can mend."""
    try:
        yield
    except RapError as error:
        sys.exit(f"error: {error}")
    except InstantiationException as error:  # Hydra's wrapping of whatever a constructor raised
        if isinstance(error.__cause__, RapError | ValueError):
            sys.exit(f"error: {error.__cause__}")
        raise


def build_windows(config: DictConfig, corpus: Corpus, llm: SwitchableLLM, seed: int) -> torch.Tensor:
    """Calibration tokens [N, T], drawn from the corpus as the config says."""
    draw, size = instantiate(config.calibration.sampling, _partial_=True), config.calibration
    check_windows(size.n_samples, size.tokens_per_sample, llm.shape.context_tokens)
    return draw(corpus, llm.tokenizer, size.n_samples, size.tokens_per_sample, seed)


def call_with(partial: functools.partial, **offered: Any) -> Any:
    """Calls what a YAML named with those of the offered arguments that it has parameters for."""
    parameters = inspect.signature(partial.func).parameters
    return partial(**{name: value for name, value in offered.items() if name in parameters})
