"""Masks of a leaderboard on data that nobody searched on: `python -m experiments.carry_over TABLE RECORD ...`.

    TABLE RECORD evaluation.search_paths=[valid.txt] evaluation.report_paths=[test.txt] --tasks NAME --agents NAME NAME

The masks that agents ended with on the first contexts of the family, of all seeds, are evaluated on other tasks. Each
NAME is a task or a tag of lm-eval, and a row of the table that comes out. A killed run is resumed by running it again:
what was measured is in the result store. KEY=VALUE says where the texts lie.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.leaderboard.checks import rebuild
from experiments.leaderboard.rows import check_rows, mask_of
from experiments.progress import phase
from experiments.records import provenance, read_records, write_record
from experiments.report.amortisation import within_ranges
from experiments.report.carry_over import METRICS, carry_over_table
from rap_env.errors import InvalidConfig, RapError, UnknownName
from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.store import ResultStore
from rap_env.llm.embedded import cache_folder
from rap_env.mask import PruningMask


def measure(
    rows: Sequence[Mapping[str, Any]],
    meters: Mapping[str, Meter],
    n_contexts: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Evaluates what rows of a leaderboard say on their first contexts.

    Args:
        rows: Of one family, with the same seeds.
        meters: By the name of what they evaluate on.
        n_contexts: How many contexts of each row.
        progress: Called with (masks measured, all masks).

    Returns:
        `dense`: metrics by name. `agents`: by agent its `seeds`, and lists over seeds and contexts of the `loss` over
        dense that the row states and of the metrics by name.
    """
    shape = next(iter(meters.values())).llm.shape
    dense, measured = PruningMask.all_kept(shape), {}
    chosen = {row["results"]["agent"]: [own[:n_contexts] for own in row["results"]["contexts"]] for row in rows}
    every = [mask_of(context, shape) for of_seeds in chosen.values() for own in of_seeds for context in own]
    for done, mask in enumerate(masks := list(dict.fromkeys([dense, *every]))):
        progress(done, len(masks))
        measured[mask] = {name: _metrics(meter.evaluate([mask])[0]) for name, meter in meters.items()}
    agents = {}
    for row in rows:
        results = row["results"]
        of_seeds = list(zip(results["dense_loss"], chosen[results["agent"]], strict=True))
        agents[results["agent"]] = {
            "seeds": results["seeds"],
            "loss": [[context["loss"] - dense_loss for context in own] for dense_loss, own in of_seeds],
            "measured": {
                name: [[measured[mask_of(context, shape)][name] for context in own] for _dense_loss, own in of_seeds]
                for name in meters
            },
        }
    return {"dense": measured[dense], "agents": agents}


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    return {metric: evaluation.mean(metric) for metric in METRICS}


def _chosen(rows: Sequence[dict[str, Any]], agents: Sequence[str], n_contexts: int) -> list[dict[str, Any]]:
    """Each agent's row of the largest token budget; refused is what could not be compared once it was measured."""
    largest = {row["results"]["agent"]: row for row in sorted(rows, key=lambda row: row["results"]["token_budget"])}
    for agent in agents:
        if agent not in largest:
            raise UnknownName("agent of the leaderboard", agent, largest)
    if len({tuple(largest[agent]["results"]["seeds"]) for agent in agents}) > 1:
        raise InvalidConfig(f"expected agents with the same seeds; those of {', '.join(agents)} differ")
    family = rows[0]["config"]["workload"]["sampler"]
    within = int(within_ranges(family, rows[0]["results"]["contexts"][0]).sum())
    if not 1 <= n_contexts <= within:
        raise InvalidConfig(f"expected 1 to {within} contexts, those that were held out; got {n_contexts}")
    return [largest[agent] for agent in agents]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and the leaderboard, measures, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="the leaderboard")
    parser.add_argument("record", type=Path, help="JSON file to write; it must not exist")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the rows' config")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="NAME", help="of lm-eval, or rap_recall_128_report"
    )
    parser.add_argument("--include-path", help="folder with further tasks")
    parser.add_argument("--limit", type=int, help="items of each task; all without it")
    parser.add_argument("--agents", nargs="+", required=True, help="the first two are what others are held against")
    parser.add_argument("--contexts", type=int, default=4, help="of each seed, the first of the held-out ones")
    options = parser.parse_intermixed_args(arguments)
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    origin = provenance()  # before the run, which takes minutes
    try:
        rows = read_records(options.table)
        check_rows(rows)
        rows = _chosen(rows, options.agents, options.contexts)
        llm = rebuild(rows[0], options.overrides, options.table).llm
        with ResultStore(cache_folder() / "results.db") as store, phase("masks") as progress:
            evaluators = {
                name: HarnessEvaluator(name, options.include_path, limit=options.limit) for name in options.tasks
            }
            meters = {name: Meter(llm, evaluator, store) for name, evaluator in evaluators.items()}
            results = measure(rows, meters, options.contexts, progress)
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    config = {"tasks": options.tasks, "limit": options.limit, "agents": options.agents, "contexts": options.contexts}
    evaluated = {name: dict(evaluator.identity) for name, evaluator in evaluators.items()}
    provenance_of_rows = {"leaderboard": [row["provenance"]["git"] for row in rows], "evaluators": evaluated}
    record = {"config": config, "provenance": origin | provenance_of_rows, "results": results}
    path = write_record(options.record, record)
    print("\n".join([*carry_over_table(record).markdown, str(path)]))


if __name__ == "__main__":
    main()
