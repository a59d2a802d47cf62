"""What the embedded reranker may learn from, compared: `python -m scripts.compare_teachers data=FOLDER record=FILE`.

Options are KEY=VALUE, as `scripts/train_reranker.py` has them. The reported queries are left out.
"""

import argparse
import sys
from pathlib import Path

from experiments.records import write_record
from experiments.report.rerank_training import rerank_teachers_table
from experiments.rerank_training.options import add_recipe_options, chosen_recipe
from experiments.rerank_training.recipe import Run
from rap_env.errors import RapError
from scripts.options import parsed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.compare_teachers", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--record", type=Path, required=True, help="where the record goes; it must not be there yet")
    add_recipe_options(parser)
    options = parsed(parser, arguments)
    try:
        if options.record.exists():
            raise FileExistsError(f"{options.record} exists, and records are written once; name another file")
        run = Run(chosen_recipe(options), options.data)
        record = run.record(run.teachers())
        print("\n".join([*rerank_teachers_table(record).markdown, f"record: {write_record(options.record, record)}"]))
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
