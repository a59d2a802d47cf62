"""Records score paths of a reranker over a collection: `python -m experiments.selection_paths COLLECTION PATHS.npz`.

The candidates of each query are BM25's best documents. `experiments.selection_learners` trains and compares on them.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.progress import phase
from experiments.records import provenance
from experiments.rerank_training.data import Collection, load_collection
from experiments.reranking import requests as reranking
from rap_env.rerank import Reranker
from rap_env.rerank.recording import Request, record_paths


def requests_of(collection: Collection, n_candidates: int) -> Iterator[Request]:
    """A request for each query, with grades where a document was judged."""
    for asked in reranking.requests_of(collection, list(collection.queries), n_candidates):
        grades = [collection.grades[asked.name].get(candidate, math.nan) for candidate in asked.documents]
        yield Request(asked.name, asked.query, list(asked.documents.values()), grades)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, records, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", type=Path, help="folder with corpus.jsonl, queries.jsonl and qrels.tsv")
    parser.add_argument("paths", type=Path, help=".npz file to write; it must not exist")
    parser.add_argument("--candidates", type=int, default=20, help="of each query")
    parser.add_argument("--document-tokens", type=int, default=256, help="where documents are cut")
    parser.add_argument("--adapter", type=Path, help="of the embedded model, instead of its own")
    options = parser.parse_args(arguments)
    if options.paths.exists():
        parser.error(f"{options.paths} exists, and score paths are not written over")
    collection = load_collection(options.collection)
    reranker = Reranker.load(adapter=options.adapter, max_document_tokens=options.document_tokens)
    source = provenance() | {
        "collection": options.collection.resolve().name,
        "candidates": options.candidates,
        "document_tokens": options.document_tokens,
        "model_digest": reranker.llm.digest,
    }
    with phase("recording") as progress:
        requests, n_queries = requests_of(collection, options.candidates), len(collection.queries)
        paths = record_paths(reranker, requests, source, lambda n_done: progress(n_done, n_queries))
    print(paths.save(options.paths))


if __name__ == "__main__":
    main()
