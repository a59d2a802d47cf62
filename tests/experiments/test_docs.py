"""Tables in the documentation are what the stored records say."""

import json
from pathlib import Path

import pytest

from experiments.report import docs
from experiments.report.docs import rewritten
from experiments.report.tables import table_lines
from rap_env.errors import RecordUnreadable, UnknownName
from tests.experiments.comparison_records import records

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
MARKED = "# Title\n\n<!-- table: toys.jsonl spending -->\nold\nlines\n<!-- end -->\n\nText.\n"


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "toys.jsonl").write_text("".join(json.dumps(made) + "\n" for made in records()))
    return tmp_path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_in_the_documentation_are_what_the_records_say(path):
    text = path.read_text(encoding="utf-8")
    assert rewritten(text, PROJECT) == text


def test_what_stands_between_markers_is_made_anew_and_the_rest_stays(root):
    new = rewritten(MARKED, root)
    table = "\n".join(table_lines("spending", {"toys": records()}))
    assert new == f"# Title\n\n<!-- table: toys.jsonl spending -->\n{table}\n<!-- end -->\n\nText.\n"
    assert rewritten(new, root) == new


def test_empty_markers_are_filled_and_several_tables_stand_in_one_text(root):
    text = "<!-- table: toys.jsonl metrics -->\n<!-- end -->\n\n<!-- table: toys.jsonl compact -->\n<!-- end -->\n"
    new = rewritten(text, root)
    for kind in ("metrics", "compact"):
        assert "\n".join(table_lines(kind, {"toys": records()})) in new


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (MARKED.replace("toys.jsonl", "tois.jsonl"), RecordUnreadable, "tois.jsonl"),
        (MARKED.replace("toys.jsonl ", ""), ValueError, "expected files and a kind of table; got '<!-- table: spen"),
        (MARKED.replace("<!-- end -->", ""), ValueError, "expected a line '<!-- end -->' after each"),
        (MARKED.replace("<!-- end -->", "") + MARKED, ValueError, "expected a line '<!-- end -->' after each"),
        (MARKED.replace("spending", "spendings"), UnknownName, "unknown kind of table 'spendings'"),
        (MARKED.replace("spending", "benchmark"), UnknownName, "unknown benchmark part 'toys'"),
    ],
)
def test_markers_that_cannot_be_filled_are_refused(text, error, message, root):
    with pytest.raises(error, match=message):
        rewritten(text, root)


def test_command_rewrites_files_and_names_those_that_changed(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    (root / "a.md").write_text(MARKED)
    (root / "b.md").write_text("No table.\n")
    docs.main(["a.md", "b.md"])
    assert capsys.readouterr().out == "a.md\n"
    assert (root / "a.md").read_text() == rewritten(MARKED, root)
    docs.main(["a.md", "b.md"])
    assert capsys.readouterr().out == ""


def test_command_refuses_in_one_line_that_names_the_document(root, monkeypatch):
    monkeypatch.chdir(root)
    (root / "a.md").write_text(MARKED.replace("toys", "tois"))
    with pytest.raises(SystemExit, match=r"^error: a\.md: .*tois\.jsonl"):
        docs.main(["a.md"])
