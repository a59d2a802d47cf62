"""The one recipe: one agent and seed searches, its policy decides, and one record says what came of it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from agents.base import Agent, Task
from agents.driver import run_search
from experiments.progress import phase
from experiments.recipes.build import Parts, build, build_tracker, check_values, plain
from experiments.recipes.folder import RECORD_NAME, claimed, finished
from experiments.recipes.measure import measure
from experiments.records import model_provenance, provenance, write_record
from experiments.tracking import Tracker
from rap_env.evaluation.meter import TokenBudget
from rap_env.policies import save_policy
from rap_env.rng import seed_everything


def run(config: DictConfig) -> float:
    """Runs one Hydra job in its output folder, unless that holds its record already.

    The same command after a kill goes on where it stopped: what was evaluated is in the result store.

    Returns:
        Mean reward on the search half, the objective of sweeps over hyperparameters.

    Raises:
        RapError: Bad input, before any work is lost.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_values(config)
    with claimed(folder):
        results = finished(folder, plain(config)) or _run(config, folder)
    return results["objective"]


def _run(config: DictConfig, folder: Path) -> dict:
    choices = HydraConfig.get().runtime.choices
    agent: Agent = instantiate(config.agent)
    parts = build(config, choices.evaluation)
    with build_tracker(config, folder, choices) as tracker, phase(f"{choices.agent} {config.seed}") as progress:
        seed_everything(config.seed)
        task = search_task(config, parts, progress=progress, log=tracker.log)
        result = run_search(agent, task, config.in_flight)
        results = {"agent": choices.agent, "seed": config.seed} | measure(result, task, parts, config.decisions)
        source = provenance() | model_provenance(parts.search.llm, parts.corpus.digest)
        record = {"config": plain(config), "provenance": source, "results": results}
        save_policy(result.policy, folder / "policy")
        path = write_record(folder / RECORD_NAME, record)  # last: who has a record has everything
        _show(record, tracker)
    print(f"record: {path}", flush=True)
    return results


def search_task(config: DictConfig, parts: Parts, **reports: Callable) -> Task:
    """What an agent is given by a config.

    Args:
        config: The composed config.
        parts: What was built from it.
        **reports: `progress` and `log`, as `Task` takes them.
    """
    return Task(
        problem=parts.search.with_budget(TokenBudget(config.token_budget)),
        windows=parts.windows,
        window_kinds=parts.window_kinds,
        sampler=parts.sampler,
        scenarios=parts.searched,
        seed=config.seed,
        removals=config.calibration.removals,
        exact=config.calibration.exact,
        **reports,
    )


def _show(record: dict[str, Any], tracker: Tracker) -> None:
    from experiments.report import closing_metrics, kept_picture, run_table  # here, for plotting takes long to import

    tracker.log(record["results"]["search"]["tokens"], closing_metrics(record))
    columns, rows = run_table(record)
    tracker.log_table("summary", columns, rows)
    tracker.log_image("kept_components", kept_picture(record))
    table = Table(title="Report half, mean over the scenarios")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(110, console.width)  # a log file has no width, and would cut the columns
    console.print(table)
