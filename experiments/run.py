"""The main recipe: rank, train, report, record."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from agents.base import Agent, SearchResult, Task
from experiments.build import Parts, agent_config, build, build_tracker, plain
from experiments.judged import judge
from experiments.progress import Phases
from experiments.records import provenance, write_record
from experiments.results import mask_picture, summarise, summary_table
from rap_env.errors import RecordExists
from rap_env.llm.embedded import cache_folder
from rap_env.policies import save_policy
from rap_env.problem import EvaluationBudget
from rap_env.rng import seed_everything

RECORD_NAME = "record.json"


def run(config: DictConfig) -> Path:
    """Runs one experiment and returns the path of its record.

    Everything that costs time is kept: evaluations and importance rounds in the result store, training in checkpoints
    named by the config. The same command after a kill goes on where it stopped.

    Raises:
        RapError: Bad input, before any work is lost.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if (folder / RECORD_NAME).exists():
        raise RecordExists(f"{folder / RECORD_NAME} exists, and records are written once; name another run folder")
    name = HydraConfig.get().runtime.choices.agent
    agent: Agent = instantiate(config.agent)
    baselines: dict[str, Agent] = {other: instantiate(agent_config(other)) for other in config.baselines}
    seed_everything(config.seed)
    with build_tracker(config, folder) as tracker, Phases() as phases:
        parts = build(config, phases.start("GSI ranking"))
        training = cache_folder() / "training" / _digest(config)
        in_training = phases.start(f"training {name}")
        task = parts.task(config.seed, training, in_training, tracker.log, EvaluationBudget(config.max_evaluations))
        result = agent.search(task)
        searched = name if name in baselines else f"learned ({name})"
        policies = {searched: result.policy}
        for other, baseline in baselines.items():
            problem = parts.search.with_budget(EvaluationBudget(config.max_evaluations))
            policies[other] = baseline.search(replace(task, problem=problem)).policy
        rows = judge(policies, parts.report, parts.grid, phases.start("report half"))
        columns, cells = summary_table(summarise(rows))
        tracker.log_table("summary", columns, cells)
        tracker.log_image("kept_components", mask_picture(rows, parts.search.shape, searched))
        save_policy(result.policy, folder / "policy")
        path = write_record(folder / RECORD_NAME, _record(config, parts, task, result, rows))
    shutil.rmtree(training, ignore_errors=True)  # finished: the same command would train anew, from stored evaluations
    _print_summary(columns, cells, path)
    return path


def _digest(config: DictConfig) -> str:
    training = {name: value for name, value in plain(config).items() if name != "tracker"}
    return hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()[:16]


def _record(config: DictConfig, parts: Parts, task: Task, result: SearchResult, rows: list[dict]) -> dict[str, Any]:
    cost = {name: getattr(result, name) for name in ("evaluations", "calibration_tokens", "seconds")}
    fresh = {"search": task.problem.fresh_evaluations, "report": parts.report.fresh_evaluations}
    ranking = {name: value for name, value in vars(parts.ranking).items() if name != "known"}
    return {
        "config": plain(config),
        "provenance": provenance() | {"model_digest": parts.search.llm.digest, "corpus_digest": parts.corpus.digest},
        "results": {
            "summary": summarise(rows),
            "policies": rows,
            "agent": cost | result.details,
            "fresh_evaluations": fresh,
            "ranking": ranking,
        },
    }


def _print_summary(columns: list[str], cells: list[list], path: Path) -> None:
    table = Table(title="Report half, mean over workloads and budgets")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in cells:
        table.add_row(*map(str, row))
    console = Console(width=max(110, Console().width))  # a log file has no width, and would cut the columns
    console.print(table)
    console.print(f"record: {path}", soft_wrap=True)
