"""Trains the embedded reranker: `python -m scripts.train_reranker data=FOLDER out=FOLDER record=FILE`.

Options are KEY=VALUE. `data` is a collection in BEIR's form. A run that was stopped goes on when it is run again.
"""

import argparse
import sys
from pathlib import Path

from experiments.records import write_record
from experiments.rerank_training.evaluation import lines
from experiments.rerank_training.lists import ListSettings
from experiments.rerank_training.recipe import Recipe, Run
from experiments.rerank_training.training import TrainingSettings
from rap_env.errors import RapError


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_reranker", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the adapter")
    parser.add_argument("--record", type=Path, required=True, help="where the record goes; it must not be there yet")
    parser.add_argument("--minutes", type=float, default=45, help="that training may take before it stops")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--first_layer", type=int, default=10, help="layers before it stay as they are")
    parser.add_argument("--document_tokens", type=int, default=128, help="where documents are cut at the end")
    parser.add_argument("--label_share", type=float, default=0.4, help="share of lists from labelled queries")
    parser.add_argument("--candidates", type=int, default=30, help="BM25's best, which are reranked")
    parser.add_argument("--validation_queries", type=int, default=20, help="for weights of fused scores")
    parser.add_argument("--report_queries", type=int, default=50, help="that nothing is learned from or chosen on")
    parser.add_argument("--report", choices=("report", "validation"), default="report", help="which queries")
    options = parser.parse_args([given if given.startswith("-") else f"--{given}" for given in arguments])
    training = TrainingSettings(
        steps=options.steps,
        learning_rate=options.learning_rate,
        first_layer=options.first_layer,
        max_document_tokens=options.document_tokens,
    )
    lists = ListSettings(label_share=options.label_share)
    chosen = {name: getattr(options, name) for name in ("validation_queries", "report_queries", "candidates", "report")}
    recipe = Recipe(training, lists, **chosen)
    try:
        if options.record.exists():
            raise FileExistsError(f"{options.record} exists, and records are written once; name another file")
        run = Run(recipe, options.data)
        if not run.train(options.out / "checkpoint.pt", options.minutes):
            sys.exit("the time is up before all steps are done: run the same command again to go on")
        run.save_adapter(options.out / "adapter")
        results = run.results()
        print("\n".join([*lines(results["systems"]), f"record: {write_record(options.record, run.record(results))}"]))
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
