"""Builds the parts of an experiment from a composed config."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rap_env.calibration import Corpus, refuse_contamination
from rap_env.errors import ContaminationFound
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import ImportanceRanking, greedy_sequential_importance
from rap_env.importance.source import ImportanceSource
from rap_env.importance.trials import RemovalMeter
from rap_env.llm.embedded import cache_folder
from rap_env.llm.switchable import SwitchableLLM
from rap_env.memory.scenario import Scenario, ScenarioSampler, scenario_grid
from rap_env.problem import EvaluationBudget, PruningProblem


@dataclass(frozen=True)
class Parts:
    """What every experiment stands on.

    Attributes:
        search: Judges masks on the search half; its budget counts what the agent asks.
        report: Judges masks on the report half.
        sampler: Scenarios to train for.
        grid: Scenarios to report on.
        corpus: Calibration text.
        windows: Tokens [N, T] of it.
        ranking: Static importance.
        importance: The same as environments take it.
    """

    search: PruningProblem
    report: PruningProblem
    sampler: ScenarioSampler
    grid: list[Scenario]
    corpus: Corpus
    windows: torch.Tensor
    ranking: ImportanceRanking
    importance: ImportanceSource


def build(config: DictConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> Parts:
    """Builds everything but the agent; cheap checks come before costly measurements.

    Args:
        config: The composed config.
        progress: Called with (rounds done, rounds in all) of the importance ranking.

    Raises:
        RapError: Whatever is wrong with the config; see `rap_env.errors`.
    """
    llm: SwitchableLLM = instantiate(config.model)
    sampler: ScenarioSampler = instantiate(config.workload.sampler)
    sampler.check(llm.shape)
    grid = scenario_grid(llm.shape, config.workload.report.workloads, config.workload.report.budget_ratios)
    search_tasks, report_tasks = build_evaluators(config)
    corpus = build_corpus(config, llm)
    refuse_contamination(corpus, search_tasks.item_texts | report_tasks.item_texts)
    store = ResultStore(config.store or cache_folder() / "results.db")
    calibration = config.calibration
    windows = build_windows(config, corpus, llm, calibration.seed)
    weights = OmegaConf.to_container(config.reward)
    search = PruningProblem(llm, search_tasks, store, weights, EvaluationBudget(config.max_evaluations))
    report = PruningProblem(llm, report_tasks, store, weights)
    ranking = greedy_sequential_importance(llm, windows, calibration.removals, calibration.exact, store, progress)
    importance = ImportanceSource(ranking.order, RemovalMeter(llm, windows, store))
    return Parts(search, report, sampler, grid, corpus, windows, ranking, importance)


def build_evaluators(config: DictConfig) -> tuple[HarnessEvaluator, HarnessEvaluator]:
    """Judges for the search and for the report half, which share no item.

    Raises:
        ContaminationFound: An item that would be reported on is searched on as well.
    """
    evaluation = config.evaluation
    options = {name: evaluation[name] for name in ("include_path", "limit", "metric", "batch_tokens")}
    halves = [None, None] if evaluation.report_tasks else ["search", "report"]
    search = HarnessEvaluator(evaluation.tasks, half=halves[0], **options)
    report = HarnessEvaluator(evaluation.report_tasks or evaluation.tasks, half=halves[1], **options)
    searched = {text: name for name, texts in search.item_texts.items() for text in texts}
    for name, texts in report.item_texts.items():
        for text in texts:
            if text in searched:
                raise ContaminationFound(
                    f"{name!r} would report on an item that {searched[text]!r} searches on: {text}"
                )
    return search, report


def build_corpus(config: DictConfig, llm: SwitchableLLM) -> Corpus:
    """Calibration text; the source that samples it from the model also takes the model and a folder."""
    source = instantiate(config.calibration.corpus, _partial_=True)
    return call_with(source, llm=llm, folder=cache_folder() / "calibration")


def build_windows(config: DictConfig, corpus: Corpus, llm: SwitchableLLM, seed: int) -> torch.Tensor:
    """Calibration tokens [N, T], drawn from the corpus as the config says."""
    draw = instantiate(config.calibration.sampling, _partial_=True)
    return draw(corpus, llm.tokenizer, config.calibration.n_samples, config.calibration.tokens_per_sample, seed)


def call_with(partial: functools.partial, **offered: Any) -> Any:
    """Calls what a YAML named with those of the offered arguments that it has parameters for."""
    parameters = inspect.signature(partial.func).parameters
    return partial(**{name: value for name, value in offered.items() if name in parameters})
