"""What a list's scores are to be, worked out by hand."""

from math import exp, sqrt

import pytest
import torch

from experiments.records import read_record
from experiments.rerank_training import recipe, teacher
from experiments.rerank_training.rivals import Bm25
from experiments.rerank_training.teacher import Teacher, TeacherWeights
from rap_env.llm.loading import build_tiny_llm
from scripts import compare_teachers
from tests.experiments.rerank_training.conftest import shared_words


def teacher_of(collection, **weights) -> Teacher:
    texts = {name: document.text for name, document in collection.documents.items()}
    return Teacher(TeacherWeights(**({"likelihood": 0.0, "first": 0.0} | weights)), Bm25(texts))


def softmax(logits) -> list[float]:
    return [exp(each) / sum(map(exp, logits)) for each in logits]


def test_what_is_wanted_goes_by_likelihoods_and_the_first_document_is_worth_more(collection):
    wanted = teacher_of(collection, likelihood=2.0, first=1.0).shares("q", ["a", "b", "c"], [-2.0, -1.0, -3.0])
    assert wanted.tolist() == pytest.approx(softmax([1.0, sqrt(6), -sqrt(6)]), rel=1e-4)  # standardised: 0, 1.22, -1.22
    alike = teacher_of(collection, likelihood=2.0).shares("q", ["a", "b"], [-1.0, -1.0])
    assert alike.tolist() == pytest.approx([0.5, 0.5])


def test_what_is_wanted_is_the_sum_of_standardised_signals(collection, monkeypatch):
    angles = {"lift": 0.0, "much lift": 0.0, "nothing": 90.0, "no more": 90.0}  # cosines with the query: 1, 0, 0
    monkeypatch.setattr(
        teacher,
        "encode_sentences",
        lambda texts: [torch.tensor([float(angles[each] == 0), float(angles[each] == 90)]).numpy() for each in texts],
    )
    texts, high, low = ["nothing", "much lift", "no more"], sqrt(2), -sqrt(0.5)
    for weights in ({"encoder": 1.5}, {"bm25": 1.5}, {"bm25": 1.0, "encoder": 0.5}):
        wanted = teacher_of(collection, **weights).shares("lift", texts, [0.0] * 3)
        assert wanted.tolist() == pytest.approx(softmax([1.5 * low, 1.5 * high, 1.5 * low]), rel=1e-4), weights


def test_no_text_is_encoded_twice_and_none_where_cosines_count_nothing(collection, monkeypatch):
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return [torch.ones(2).numpy()] * len(texts)

    monkeypatch.setattr(teacher, "encode_sentences", encode)
    teacher_of(collection, bm25=1.0).shares("q", ["a", "b"], [0.0, 0.0])
    assert encoded == []
    counted = teacher_of(collection, encoder=1.0)
    counted.shares("q", ["a", "b"], [0.0, 0.0])
    counted.shares("q", ["b", "c"], [0.0, 0.0])
    assert encoded == ["q", "a", "b", "c"]


def test_the_script_compares_teachers_without_the_reported_queries(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "encoder_scores", shared_words)
    monkeypatch.setattr(recipe, "load_llm", lambda _name, _dtype: build_tiny_llm())
    options = [f"data={folder}", f"record={tmp_path / 'record.json'}", "first_layer=2", "candidates=5"]
    options += ["validation_queries=4", "report_queries=6"]
    compare_teachers.main(options)
    assert "1.0 likelihood" in capsys.readouterr().out
    record = read_record(tmp_path / "record.json")
    assert record["results"]["queries"] == 14 and len(record["results"]["sums"]) == 66
    assert str(tmp_path) not in str(record)
    with pytest.raises(SystemExit, match="records are written once"):
        compare_teachers.main(options)
