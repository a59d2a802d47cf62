"""Everything that reads files of data: how a valid one is made, and how it is read."""

import contextlib
import functools
import json
from pathlib import Path

import numpy as np

from experiments.collect import write_table
from experiments.records import read_record, read_records, write_record
from experiments.rerank_training.data import load_collection
from experiments.reranking.answers import AnswerFile
from experiments.reranking.paths import paths_of
from experiments.serving import finished
from experiments.serving.child import Outcome, Sample
from rap_env.calibration import kinds, local_corpus
from rap_env.errors import InfeasibleBudget
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.table import load_tables
from rap_env.export.save import read_mask
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint
from rap_env.memory.workload import Workload
from rap_env.policies import load_policy, save_policy
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.synthetic import synthetic_paths
from rap_env.serving.readings import BudgetFile
from rap_env.serving.tables import ServingTable
from rap_env.serving.traces import read_trace
from tests.evaluation.table_cases import write_tiny_tables
from tests.experiments.comparison_records import record, row
from tests.hardening.fuzzing import Subject
from tests.policies.cases import MAKERS
from tests.serving.cases import TABLE

_IDENTITY, _RESULT = {"model": "toy", "mask": "all"}, {"score": 0.5, "tasks": {"toy": {"acc": 0.5}}}
_SPEC = {"trace": "toy", "seconds": [1, 2]}
_QUESTIONS = [{"question": f"why {n}", "choices": ["a", "b"], "gold": n % 2} for n in range(20)]
_PASSAGES = [{"question": f"why {n}", "passage": f"Hills {n}.", "label": n % 2} for n in range(6)]
_TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second}.6805900,{10 * second},{second}\n" for second in range(10, 20)
)


tiny_llm = functools.cache(build_tiny_llm)


def _decide(folder: Path) -> None:
    """A policy that was read has to decide within the budget."""
    policy, workload = load_policy(folder), Workload(2, 96)
    budget_bytes = int(0.7 * dense_bytes(policy.shape, workload))
    with contextlib.suppress(InfeasibleBudget):
        mask = policy.decide(workload, budget_bytes)
        assert policy.kind == "dense" or footprint(policy.shape, mask, workload).peak_bytes <= budget_bytes


def _look_up(folder: Path) -> None:
    model = load_tables(str(folder / "toy.npz"))
    list(model.evaluator.evaluate_many(model, [model.mask, model.mask.drop("layer0.mlp", "layer1.mlp")]))


def _a_record() -> dict:
    return record("greedy", 0, [row((1, 512), 0.9, 2.0, ["layer0.mlp"])], evaluations=3)


def _outcome() -> Outcome:
    samples = [Sample(*range(len(Sample._fields)))] * 3
    return Outcome(0, None, 5, samples, "RLIMIT_DATA", True, 0.5)


def _fill_store(folder: Path) -> None:
    with ResultStore(folder / "results.db") as store:
        store.put(_IDENTITY, _RESULT)
        for number in range(20):
            store.put(_IDENTITY | {"mask": str(number)}, _RESULT)
        store.claim([_IDENTITY | {"mask": "claimed"}])


def _use_store(folder: Path) -> None:
    with ResultStore(folder / "results.db") as store:
        store.get(_IDENTITY)
        len(store)
        list(store.evaluations("toy"))
        store.claim([_IDENTITY | {"mask": "claimed"}])


def _answers(folder: Path) -> None:
    answers = AnswerFile(folder / "system.jsonl")
    answers.has({"repeat": 0, "rank": 1, "candidates": 5, "top_k": None})


def _write_answers(folder: Path) -> None:
    for number in range(3):
        asked = {"repeat": 0, "rank": number, "candidates": 5, "top_k": None}
        AnswerFile(folder / "system.jsonl").add(asked | {"seconds": 0.5})


def _scores(folder: Path) -> None:
    paths_of([3], 4, lambda: None, folder, lambda done, of: None)


def _write_scores(folder: Path) -> None:
    (folder / "3.json").write_text(json.dumps({"path": np.ones((2, 4)).tolist(), "tokens": [1, 2, 3, 4]}))


def _lines(rows: list[dict], name: str):
    return lambda folder: (folder / name).write_text("".join(json.dumps(each) + "\n" for each in rows))


def _write_collection(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text('{"_id": "d", "title": "Hills", "text": "Hills are high."}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "what is high?"}\n')
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")


def _mask(folder: Path) -> None:
    mask = PruningMask.all_kept(tiny_llm().shape).drop("layer0.mlp", "layer2.attention")
    (folder / "mask.json").write_text(mask.to_json())


DATA = [
    *(
        Subject(f"policy {kind}", lambda folder, make=make: save_policy(make(tiny_llm().shape), folder), _decide)
        for kind, make in MAKERS.items()
    ),
    Subject(
        "record",
        lambda folder: write_record(folder / "record.json", _a_record()),
        lambda folder: read_record(folder / "record.json"),
    ),
    *(
        Subject(
            name,
            lambda folder, name=name: write_table(folder / name, [_a_record()] * 3),
            lambda folder, name=name: read_records(folder / name),
        )
        for name in ("table.jsonl", "table.jsonl.gz")
    ),
    Subject(
        "outcome of a replay",
        lambda folder: finished.keep(folder / "outcome.json", _SPEC, _outcome()),
        lambda folder: finished.kept(folder / "outcome.json", _SPEC),
    ),
    Subject("answers of a reranker", _write_answers, _answers, leaves=(".jsonl",)),
    Subject("scores of a reranker", _write_scores, _scores),
    Subject("result store", _fill_store, _use_store, leaves=("-wal", "-shm", "results.db")),
    Subject("table of evaluations", write_tiny_tables, _look_up),
    Subject(
        "serving table",
        lambda folder: TABLE.save(folder / "table.json"),
        lambda folder: ServingTable.load(folder / "table.json").needed_bytes(1, 10),
    ),
    Subject(
        "score paths",
        lambda folder: synthetic_paths(n_queries=3).save(folder / "paths.npz"),
        lambda folder: ScorePaths.load(folder / "paths.npz"),
    ),
    Subject(
        "request trace",
        lambda folder: (folder / "trace.csv").write_text(_TRACE),
        lambda folder: read_trace(folder / "trace.csv"),
    ),
    Subject("dialogue", _lines(_QUESTIONS, "rows.jsonl"), lambda folder: kinds.dialogue(folder / "rows.jsonl")),
    Subject("questions", _lines(_PASSAGES, "rows.jsonl"), lambda folder: kinds.questions(folder / "rows.jsonl")),
    Subject(
        "calibration text",
        lambda folder: (folder / "text.txt").write_text("A hill: high, and far.\n" * 9),
        lambda folder: local_corpus(folder / "text.txt"),
    ),
    Subject("retrieval collection", _write_collection, load_collection),
    Subject("mask", _mask, lambda folder: read_mask(tiny_llm(), folder / "mask.json")),
    Subject(
        "budget", lambda folder: (folder / "budget.txt").write_text("5000"), lambda f: BudgetFile(f / "budget.txt")()
    ),
]
