"""A small collection, and scores that need no model."""

import json
from pathlib import Path

import pytest

from experiments.rerank_training.data import Collection, load_collection

SUBJECTS = ("wing", "nozzle", "plate", "cylinder", "cone", "shell", "rotor", "wake")
PROPERTIES = ("lift", "drag", "heat", "buckling", "vibration")


def shared_words(queries, candidates, texts):
    """How many words a document shares with the query, in place of the sentence encoder's cosines."""
    return {
        query: {name: float(len(set(queries[query].split()) & set(texts[name].split()))) for name in names}
        for query, names in candidates.items()
    }


def write_collection(folder: Path) -> Path:
    """Forty documents on a property of a subject each, and twenty queries with two relevant documents each."""
    folder.mkdir()
    pairs = [(subject, each) for subject in SUBJECTS for each in PROPERTIES]
    documents = []
    for number, (subject, each) in enumerate(pairs):
        title = f"the {each} of a {subject} ."
        body = (
            f"a study of {each} was made for this {subject} at several speeds . "
            + f"more was said of {subject} . " * 10
        )
        documents.append({"_id": f"d{number}", "title": title, "text": f"{title} {body}"})
    documents.append({"_id": "empty", "title": "", "text": ""})
    queries, lines = [], ["query-id\tcorpus-id\tscore"]
    for number, (subject, each) in enumerate(pairs[::2]):
        queries.append({"_id": f"q{number}", "text": f"what is known of the {each} of some {subject}"})
        lines += [f"q{number}\td{2 * number}\t4", f"q{number}\td{(2 * number + 1) % 40}\t1"]
    queries.append({"_id": "unjudged", "text": "what is a wing"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_collection(tmp_path / "toy")


@pytest.fixture
def collection(folder) -> Collection:
    return load_collection(folder)
