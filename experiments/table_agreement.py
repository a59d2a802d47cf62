"""Holds a table of scores against the model: `python -m experiments.table_agreement COMPARISON.jsonl RECORD.json`.

COMPARISON holds records of finished runs on the model and the text that the table is of. The same agents search on the
table with the same token budget and scenarios; how far both order them alike is Kendall's tau over the agents. With the
same seeds a search finds all of its masks in a table that holds its evaluations, so that it is only repeated. Therefore
each is repeated with other seeds as well, and with its own seed on a table without any mask that it evaluated. Beside
it stand the errors of what the table predicts: of masks left out at random, and of the best ones.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from scipy.stats import kendalltau

from agents.base import Task
from agents.driver import run_search
from experiments.records import provenance, read_records, write_record
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.simulator import fitted
from rap_env.evaluation.table import EMBEDDED_TABLE, ScoreTable, TableModel, load_tables
from rap_env.mask import PruningMask
from rap_env.memory.scenario import scenario_grid
from rap_env.problem import PruningProblem
from rap_env.rng import seed_everything

_FOLDS = 4
_BEST = 0.1  # part of each cell
_CELLS = (25, 6)  # of the share of MLP parts kept, and of attention parts
_LEAST = 10
_WAYS = ("same_seed", "other_seed", "without_own")
OTHER_SEEDS = 100  # what is added to a record's seed


def errors(table: ScoreTable, least: int = _LEAST) -> dict[str, Any]:
    """How far predictions of masks are off that the simulator was not fitted to, in nats.

    Args:
        table: Holds the masks.
        least: Masks of a cell whose best are looked at.

    Returns:
        `random`: masks left out at random. `best`: the best tenth of each cell of masks of about as many bytes, left
        out together. `selected`: of the masks that were left out at random, the one of each cell that is predicted
        best; what it promises too much is what a search finds that believes in it.
    """
    widths, losses, simulator = table.widths.astype(np.int64), table.losses.astype(float), table.simulator
    shape = simulator.n_parts, simulator.is_attention, simulator.dense_loss

    def predicted(left_out: np.ndarray) -> np.ndarray:
        return fitted(widths[~left_out], losses[~left_out], *shape).losses(widths[left_out])

    cells = _cells(widths, *shape[:2])
    fold, guess = np.random.default_rng(0).integers(_FOLDS, size=len(widths)), np.zeros(len(widths))
    for index in range(_FOLDS):
        guess[fold == index] = predicted(fold == index)
    selected = [
        rows[np.argmin(guess[rows])] for index in range(_FOLDS) for rows in _large_cells(cells, fold == index, least)
    ]
    best = np.zeros(len(widths), dtype=bool)
    for rows in _large_cells(cells, np.ones(len(widths), dtype=bool), least):
        best[rows[np.argsort(losses[rows])[: max(1, int(_BEST * len(rows)))]]] = True
    return {
        "random": _summary(guess, losses, simulator.dense_loss),
        "best": _summary(predicted(best), losses[best], simulator.dense_loss),
        "selected": _summary(guess[selected], losses[selected], simulator.dense_loss),
    }


def _cells(widths: np.ndarray, n_parts: np.ndarray, is_attention: np.ndarray) -> np.ndarray:
    """The number of a mask's cell [N], by the shares of MLP and attention parts that it keeps."""
    mlps, attentions = (
        np.round(cut * widths[:, kind].sum(axis=1) / n_parts[kind].sum()).astype(int)
        for cut, kind in zip(_CELLS, (~is_attention, is_attention), strict=True)
    )
    return mlps * (1 + _CELLS[1]) + attentions


def _large_cells(cells: np.ndarray, among: np.ndarray, least: int) -> Iterator[np.ndarray]:
    """Rows of each cell with enough masks among some."""
    for cell in np.unique(cells):
        if len(rows := np.flatnonzero((cells == cell) & among)) >= least:
            yield rows


def _summary(predicted: np.ndarray, measured: np.ndarray, dense_loss: float) -> dict[str, float]:
    off, logs = predicted - measured, [np.log(np.maximum(of - dense_loss, -0.2) + 0.3) for of in (predicted, measured)]
    return {
        "masks": len(off),
        "mean_absolute": float(abs(off).mean()),
        "median_absolute": float(np.median(abs(off))),
        "mean": float(off.mean()),
        "r2_of_logarithms": float(1.0 - ((logs[0] - logs[1]) ** 2).mean() / logs[1].var()),
    }


def searched(
    model: TableModel, record: Mapping[str, Any], seed: int
) -> tuple[dict[str, Any], list[PruningMask], set[PruningMask]]:
    """Lets a recorded run's agent search on tables.

    Args:
        model: Has them.
        record: Of the run on the model.
        seed: Of the search.

    Returns:
        The mean loss over dense of the masks for the record's scenarios, as the main table has it, in nats, and what
        the search cost; these masks; and all masks that it asked about.
    """
    config, dense = record["config"], model.evaluator.table.simulator.dense_loss
    workload, calibration = config["workload"], config["calibration"]
    search, report = (
        scenario_grid(model.shape, half["workloads"], half["budget_ratios"], workload["generated_tokens"])
        for half in (workload["search"], workload["report"])
    )
    budget = TokenBudget(config["token_budget"])
    problem = PruningProblem(model, model.evaluator, None, config["reward"], budget)
    windows = torch.zeros(model.evaluator.table.about["windows"], dtype=torch.long)
    options = {"removals": calibration["removals"], "exact": calibration["exact"]}
    task = Task(problem, windows, instantiate(workload["sampler"]), search, seed, **options)
    seed_everything(seed)
    started = time.process_time()
    result = run_search(instantiate(config["agent"]), task)
    masks = [result.policy.decide(one.workload, one.budget_bytes) for one in report]
    found = model.evaluator.table.look_up(masks)
    asked = {entry.key for entry in budget.history if isinstance(entry.key, PruningMask)}
    return (
        {
            "loss": statistics.mean(loss for loss, _is_measured in found) - dense,
            "measured_masks": sum(is_measured for _loss, is_measured in found),
            "asked": len(asked),
            "measured_of_asked": sum(is_measured for _loss, is_measured in model.evaluator.table.look_up(list(asked))),
            "tokens": result.tokens,
            "cpu_seconds": time.process_time() - started,
        },
        masks,
        asked,
    )


def without(model: TableModel, masks: Iterable[PruningMask]) -> TableModel:
    """The tables fitted anew without some masks; the dense one stays."""
    gone = {bytes(mask.nested.widths) for mask in masks} - {bytes(PruningMask.all_kept(model.shape).widths)}
    tables = []
    for table in model.tables:
        kept, own = np.array([bytes(row) not in gone for row in table.widths]), table.simulator
        widths, losses = table.widths[kept], table.losses[kept]
        simulator = fitted(widths.astype(np.int64), losses.astype(float), own.n_parts, own.is_attention, own.dense_loss)
        tables.append(replace(table, widths=widths, losses=losses, simulator=simulator))
    return model.with_tables(tables)


def compared(model: TableModel, record: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded run on the model, and its agent on tables; see the module. Losses over dense in nats."""
    own, seed = record["results"], record["config"]["seed"]
    first = next(iter(own["evaluators"]))
    same, masks, asked = searched(model, record, seed)
    return {
        "agent": own["agent"],
        "seed": own["seed"],
        "model": own["dense"]["search"] - statistics.mean(row["search"]["score"] for row in own["rows"]),
        "model_report": own["dense"][first] - statistics.mean(row["reports"][first]["score"] for row in own["rows"]),
        "same_seed": same,
        "other_seed": searched(model, record, seed + OTHER_SEEDS)[0],
        "without_own": searched(without(model, asked.union(masks)), record, seed)[0],
    }


def agreement(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Kendall's tau between orders of agents, by their means over seeds: on the model's two halves, and on tables."""
    agents = sorted({run["agent"] for run in runs})

    def means(loss_of: Callable[[Mapping[str, Any]], float]) -> list[float]:
        return [statistics.mean(loss_of(run) for run in runs if run["agent"] == agent) for agent in agents]

    model, model_report = means(lambda run: run["model"]), means(lambda run: run["model_report"])
    made: dict[str, Any] = {"agents": agents, "model": model, "model_report": model_report}
    for way in _WAYS:
        losses = means(lambda run, way=way: run[way]["loss"])
        tau, tau_report = (float(kendalltau(losses, of_model).statistic) for of_model in (model, model_report))
        made[way] = {"losses": losses, "tau": tau, "tau_report": tau_report}
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and the records, searches on the table, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="records of runs, one a line")
    parser.add_argument("record", type=Path, help="file to write; it must not exist")
    parser.add_argument("--table", default=EMBEDDED_TABLE, help="as load_tables takes it")
    parser.add_argument("--agents", nargs="*", help="of the comparison; all of them by default")
    parser.add_argument("--seeds", type=int, nargs="*", help="all of them by default")
    options = parser.parse_args(arguments)
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    source, model, runs = provenance(), load_tables(options.table), []
    for record in read_records(options.comparison):
        agent, seed = record["results"]["agent"], record["results"]["seed"]
        if agent in (options.agents or (agent,)) and seed in (options.seeds or (seed,)) and agent != "dense":
            runs.append(compared(model, record))
            print(json.dumps(runs[-1]), flush=True)
    config = {name: str(value) for name, value in vars(options).items()} | {"evaluator": dict(model.evaluator.identity)}
    tables = [{**each.about, "masks": len(each.losses)} for each in model.tables]
    results = {"agreement": agreement(runs), "errors": errors(model.tables[0]), "runs": runs, "tables": tables}
    print(json.dumps({name: results[name] for name in ("agreement", "errors")}, indent=1))
    write_record(options.record, {"config": config, "provenance": source, "results": results})


if __name__ == "__main__":
    main()
