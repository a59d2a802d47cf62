"""Compares agents under equal evaluation budgets: `python -m experiments.compare`; see conf/compare.yaml.

Every agent and seed searches on a problem of its own with the same model, judges, store and limit of evaluations, and
is written as one record as soon as it is finished. The same command goes on after a kill: records that are there are
skipped, and what an unfinished search has already judged comes from the store.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from agents.base import Agent, Task
from experiments.build import Parts, agent_config, build, build_tracker, plain, refusing_in_one_line
from experiments.comparison import Comparison
from experiments.entry import OrderedBudget, measure
from experiments.figures import exhibits
from experiments.merit import merit_table
from experiments.page import write_page
from experiments.progress import Phases
from experiments.records import provenance, read_record, write_record
from experiments.report import markdown_table
from experiments.tracking import Tracker
from rap_env.errors import RecordExists
from rap_env.rng import seed_everything

PAGE_NAME = "page.html"
# Other seeds and agents may join a comparison later, and neither they nor the tracker change what a record says.
_NOT_IN_RECORDS = ("agents", "settings", "tracker", "store")


@dataclass(frozen=True)
class Entrant:
    """An agent with a seed, and where its record stands or will stand."""

    name: str
    seed: int
    path: Path
    config: dict[str, Any]
    agent: Agent


def run(config: DictConfig) -> list[Path]:
    """Runs what is not finished yet, and reports on all of it.

    Returns:
        The record of every agent and seed.

    Raises:
        RecordExists: The folder holds records of another comparison.
        RapError: Bad input, before any work is lost.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(HydraConfig.get().runtime.output_dir)
    entrants = _entrants(config, folder)
    missing = [entrant for entrant in entrants if not _is_finished(entrant)]
    with build_tracker(config, folder / "tracker") as tracker, Phases() as phases:
        if missing:
            parts = build(config, phases.start("GSI ranking"), config.report)
            judges = {HydraConfig.get().runtime.choices.evaluation: parts.report} | parts.further
        for number, entrant in enumerate(missing, 1):
            progress = phases.start(f"{entrant.name} {entrant.seed} ({number} of {len(missing)})")
            task = _task(entrant, config.max_evaluations, parts, tracker, progress)
            seed_everything(entrant.seed)
            results = measure(entrant.agent, task, parts, judges, config.decisions)
            _write(entrant, parts, results)
            shutil.rmtree(task.folder, ignore_errors=True)
        comparison = Comparison.read([entrant.path for entrant in entrants])
        columns, cells = merit_table(comparison)
        tracker.log_table("comparison", columns, cells)
        for exhibit in exhibits(comparison):
            tracker.log_figure(exhibit.name, exhibit.figure)
    page = write_page(comparison, folder / PAGE_NAME)
    print("\n".join([*markdown_table(columns, cells), f"records: {folder}", f"page: {page}"]), flush=True)
    return [entrant.path for entrant in entrants]


def _entrants(config: DictConfig, folder: Path) -> list[Entrant]:
    """Everyone who takes part; what is wrong with their configs is found here, before any work."""
    shared = {key: value for key, value in plain(config).items() if key not in _NOT_IN_RECORDS}
    entrants = []
    for name, n_seeds in config.agents.items():
        own = agent_config(name, config.settings.get(name))
        agent: Agent = instantiate(own)
        for seed in range(n_seeds):
            record_config = shared | {"agent": plain(own), "seed": seed}
            entrants.append(Entrant(name, seed, folder / f"{name}-{seed}.json", record_config, agent))
    return entrants


def _is_finished(entrant: Entrant) -> bool:
    if not entrant.path.exists():
        return False
    recorded = read_record(entrant.path)["config"]
    keys = recorded.keys() | entrant.config.keys()
    if other := sorted(key for key in keys if recorded.get(key) != entrant.config.get(key)):
        raise RecordExists(
            f"{entrant.path} is of a comparison with another {', '.join(other)}; give this one another `name`"
        )
    return True


def _task(
    entrant: Entrant,
    max_evaluations: int,
    parts: Parts,
    tracker: Tracker,
    progress: Callable[[int, int], None],
) -> Task:
    """The entrant's own problem and an empty folder: a resumed search would not know in which order it had asked."""
    folder = entrant.path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        tracker.log(step, {f"{entrant.name}-{entrant.seed}/{name}": value for name, value in metrics.items()})

    return parts.task(entrant.seed, folder, progress, log, OrderedBudget(max_evaluations))


def _write(entrant: Entrant, parts: Parts, results: dict[str, Any]) -> None:
    digests = {"model_digest": parts.search.llm.digest, "corpus_digest": parts.corpus.digest}
    results = {"agent": entrant.name, "seed": entrant.seed} | results
    write_record(entrant.path, {"config": entrant.config, "provenance": provenance() | digests, "results": results})


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(config: DictConfig) -> None:
    with refusing_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
