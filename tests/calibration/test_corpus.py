import json
import sys
from types import SimpleNamespace

import pytest

from rap_env.calibration import Corpus, find_overlaps, hub_corpus, local_corpus, local_text, packaged_corpus
from rap_env.errors import CorpusUnavailable, UnknownName
from rap_env.evaluation.harness import HarnessEvaluator


def fake_hub(monkeypatch, load_dataset) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_the_digest_depends_on_the_documents_and_their_borders_but_not_on_the_name():
    corpus = Corpus("a", ("one two", "three"))
    assert corpus.digest == Corpus("b", ("one two", "three")).digest
    assert corpus.digest != Corpus("a", ("one", " twothree")).digest
    assert corpus.digest != Corpus("a", ("three", "one two")).digest


@pytest.mark.parametrize("documents", [(), ("", " \n")])
def test_a_corpus_without_text_is_refused(documents):
    with pytest.raises(CorpusUnavailable, match="'nothing' holds no text"):
        Corpus("nothing", documents)


def test_a_plain_file_is_one_document_and_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("second\n\nstill second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("no text file")
    assert local_corpus(tmp_path).documents == ("first", "second\n\nstill second")
    assert local_corpus([tmp_path / "b.txt", str(tmp_path / "a.txt")]).documents == ("second\n\nstill second", "first")


def test_wikitext_is_split_in_front_of_article_headings_only(tmp_path):
    first = " = Homarus gammarus = \n \n Lobster . \n \n = = Description = = \n \n Large ; a = b = c . \n \n"
    second = " = M @-@ 82 ( Michigan highway ) = \n \n Road . \n"
    (tmp_path / "wiki.txt").write_text(" \n" + first + second)
    assert local_corpus(tmp_path / "wiki.txt").documents == (first, second)


def test_local_errors_name_the_path(tmp_path):
    with pytest.raises(CorpusUnavailable, match=r"missing\.txt: .*No such file"):
        local_corpus(tmp_path / "missing.txt")
    with pytest.raises(CorpusUnavailable, match=r"folder .* has no \.txt file"):
        local_corpus([tmp_path])
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(CorpusUnavailable, match=r"empty\.txt is empty"):
        local_corpus(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorpusUnavailable, match=r"can't read .*binary\.txt"):
        local_corpus(tmp_path / "binary.txt")


def test_the_hub_is_streamed_and_read_only_as_far_as_the_limit(monkeypatch):
    taken = []

    def load_dataset(dataset, config, split, streaming):
        assert (dataset, config, split, streaming) == ("allenai/c4", "en", "validation", True)
        for text in ("one", " ", "two", "three", "four"):
            taken.append(text)
            yield {"text": text, "url": "-"}

    fake_hub(monkeypatch, load_dataset)
    assert hub_corpus("allenai/c4", "en", split="validation", limit=2).documents == ("one", "two")
    assert taken == ["one", " ", "two"]


def test_an_unknown_column_is_reported_with_the_known_ones(monkeypatch):
    fake_hub(monkeypatch, lambda *args, **kwargs: iter([{"content": "one", "url": "-"}]))
    with pytest.raises(CorpusUnavailable, match="no column 'text'; known: content, url"):
        hub_corpus("some/set")


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("BuilderConfig not found")])
def test_a_hub_failure_says_what_to_use_instead(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(
        CorpusUnavailable, match=rf"can't load .*'some/set'.*{error}.*calibration=packaged.*local files"
    ):
        hub_corpus("some/set")


def test_the_packaged_text_is_the_same_on_every_machine():
    assert packaged_corpus() == packaged_corpus("calibration")
    assert packaged_corpus().digest == "1efd904b89530378479312cc99d4c3def4b17b376ebdbb505ca0cc5b1865a70e"
    assert packaged_corpus("evaluation").digest == "59913830f5bd10b42a5efd8d7dc048e26f153222525810c3c97c33ddfefd4b8b"
    assert len(packaged_corpus().documents) == 8 and len(packaged_corpus("evaluation").documents) == 12
    with pytest.raises(UnknownName, match="unknown packaged text 'novel'; known: calibration, evaluation"):
        packaged_corpus("novel")


def test_packaged_texts_share_nothing_with_each_other_and_hold_no_embedded_item():
    calibration, evaluation = packaged_corpus().documents, packaged_corpus("evaluation").documents
    assert find_overlaps(calibration, {"evaluation": evaluation}) == []
    assert find_overlaps(evaluation[0::2], {"odd": evaluation[1::2]}) == []
    items = HarnessEvaluator(["rap_search", "rap_report"]).item_texts
    assert len(items) == 12
    for texts in items.values():
        assert not [
            text for text in texts for document in (*calibration, *evaluation) if text.lower() in document.lower()
        ]


def test_a_line_separator_inside_a_document_does_not_cut_it(tmp_path, monkeypatch):
    (tmp_path / "odd.jsonl").write_text(
        json.dumps({"text": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    monkeypatch.setattr("rap_env.calibration.corpus.TEXT_FOLDER", tmp_path)
    assert packaged_corpus("odd").documents == ("one\u2028two",)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("at home")
    assert local_corpus("~/text.txt").documents == ("at home",) and local_text(["~/text.txt"]) == "at home"
