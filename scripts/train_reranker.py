"""Trains the embedded reranker: `python -m scripts.train_reranker data=FOLDER out=FOLDER record=FILE`.

Options are KEY=VALUE. `data` is a collection in BEIR's form. A run that was stopped goes on when it is run again.
"""

import argparse
import sys
from pathlib import Path

from experiments.records import write_record
from experiments.rerank_training.evaluation import lines
from experiments.rerank_training.options import add_recipe_options, chosen_recipe
from experiments.rerank_training.recipe import Run
from rap_env.errors import RapError
from scripts.options import parsed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_reranker", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the adapter")
    parser.add_argument("--record", type=Path, required=True, help="where the record goes; it must not be there yet")
    parser.add_argument("--start", type=Path, help="folder of an adapter to go on from; by default an untrained one")
    parser.add_argument("--minutes", type=float, default=45, help="that training may take before it stops")
    add_recipe_options(parser)
    options = parsed(parser, arguments)
    try:
        if options.record.exists():
            raise FileExistsError(f"{options.record} exists, and records are written once; name another file")
        run = Run(chosen_recipe(options), options.data, options.start)
        if not run.train(options.out / "checkpoint.pt", options.minutes):
            sys.exit("the time is up before all steps are done: run the same command again to go on")
        run.save_adapter(options.out / "adapter")
        results = run.results()
        print("\n".join([*lines(results["systems"]), f"record: {write_record(options.record, run.record(results))}"]))
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
