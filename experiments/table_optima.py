"""Measures what a table promises of its own optima: `python -m experiments.table_optima RUN COMPARISON.jsonl RECORD`.

The agents of COMPARISON search on the table with seeds that the table has not seen. The masks that they end with, as
far as they were never measured, are evaluated on the model that RUN had, on the same text.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from experiments.progress import phase
from experiments.recipes.build import build_halves, build_llm
from experiments.recipes.folder import RECORD_NAME
from experiments.records import provenance, read_record, read_records, write_record
from experiments.table_agreement import OTHER_SEEDS, searched
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.table import EMBEDDED_TABLE, load_tables
from rap_env.mask import PruningMask


def promised(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, Any]:
    """How far predicted losses over dense are from measured ones, in nats; below zero where too much is promised."""
    off = np.array(predicted) - np.array(measured)
    return {
        "masks": len(off),
        "predicted": list(predicted),
        "measured": list(measured),
        "mean": float(off.mean()),
        "mean_absolute": float(abs(off).mean()),
        "largest": float(abs(off).max()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and the records, searches, measures, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("comparison", type=Path, help="records of runs, one a line")
    parser.add_argument("record", type=Path, help="file to write; it must not exist")
    parser.add_argument("--table", default=EMBEDDED_TABLE, help="as load_tables takes it")
    parser.add_argument("--agents", nargs="+", required=True, help="of the comparison, with their first seed")
    options = parser.parse_args(arguments)
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    source, model, ended = provenance(), load_tables(options.table), {}
    table = model.evaluator.table
    for record in read_records(options.comparison):
        agent, seed = record["results"]["agent"], record["results"]["seed"]
        if agent in options.agents and agent not in ended:
            _result, masks, _asked = searched(model, record, seed + OTHER_SEEDS)
            ended[agent] = [mask for mask in dict.fromkeys(masks) if not table.look_up([mask])[0][1]]
    config = OmegaConf.create(read_record(options.run / RECORD_NAME)["config"])
    llm, _corpus = build_llm(config)
    meter, results = Meter(llm, build_halves(config.evaluation, llm).search), {}
    dense = -meter.evaluate([PruningMask.all_kept(llm.shape)])[0].score
    with phase("masks on the model") as progress:
        for index, (agent, masks) in enumerate(ended.items()):
            same = [PruningMask.from_widths(llm.shape, mask.nested.widths) for mask in masks]
            measured = [-evaluation.score - dense for evaluation in meter.evaluate(same)]
            predicted = [loss - table.simulator.dense_loss for loss, _is_measured in table.look_up(masks)]
            results[agent] = promised(predicted, measured)
            progress(index + 1, len(ended))
    told = {name: str(value) for name, value in vars(options).items()} | {"evaluator": dict(model.evaluator.identity)}
    write_record(options.record, {"config": told, "provenance": source, "results": results})
    for agent, of in results.items():
        print(f"{agent}: {of['masks']} masks, {of['mean']:+.3f} nats off, {of['mean_absolute']:.3f} absolute")


if __name__ == "__main__":
    main()
