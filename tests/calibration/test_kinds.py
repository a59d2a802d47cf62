"""Each kind of text comes as two corpora without a common document."""

import json

import pytest

from rap_env.calibration import kinds
from rap_env.errors import CorpusUnavailable


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_code_is_pythons_own_and_dealt_by_modules():
    search, report = kinds.code()
    assert search.digest != report.digest and set(search.documents).isdisjoint(report.documents)
    assert all("\ndef " in text or "\nclass " in text or "import " in text for text in search.documents)
    assert kinds.code()[0].digest == search.digest


def test_a_dialogue_has_turns_of_question_and_right_choice(tmp_path):
    rows = [{"question": f"How {number}?", "choices": ["wrong", f"So {number}."], "gold": 1} for number in range(20)]
    search, report = kinds.dialogue(write(tmp_path / "rows.jsonl", rows))
    assert search.documents[0].startswith("User: How 0?\nAssistant: So 0.\nUser: How 1?\n")
    assert report.documents[0].startswith("User: How 8?") and "How 16?" in search.documents[1]
    assert "wrong" not in "".join(search.documents + report.documents)


def test_questions_on_one_passage_stand_together(tmp_path):
    asked = [("Hills are high.", "are hills high", 1), ("Seas are deep.", "is the sea dry", 0)]
    rows = [{"passage": p, "question": q, "label": answer} for p, q, answer in [*asked, ("Hills are high.", "why", 0)]]
    search, report = kinds.questions(write(tmp_path / "rows.jsonl", rows))
    expected = "Hills are high.\nQuestion: are hills high?\nAnswer: yes\nQuestion: why?\nAnswer: no\n\n"
    assert search.documents == (expected,)
    assert report.documents == ("Seas are deep.\nQuestion: is the sea dry?\nAnswer: no\n\n",)


def test_prose_is_two_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    search, report = kinds.prose([str(tmp_path / "a.txt")], [str(tmp_path / "b.txt")])
    assert (search.documents, report.documents) == (("text a",), ("text b",))


def test_other_rows_are_refused(tmp_path):
    with pytest.raises(CorpusUnavailable, match=r"none\.jsonl: not JSON lines: .*No such file"):
        kinds.dialogue(tmp_path / "none.jsonl")
    with pytest.raises(CorpusUnavailable, match=r"row 1: expected 'passage' \(str\) and 'question'"):
        kinds.questions(write(tmp_path / "rows.jsonl", [{"question": "why", "gold": 0}]))
