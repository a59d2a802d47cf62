"""The tutorial runs as it is shown, and pages of the site that lie elsewhere are made from what is there."""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from scripts.site_pages import first_page, notebook_page, on_page_markdown, reference

PROJECT = Path(__file__).parents[2]
TUTORIAL = PROJECT / "docs" / "tutorial.ipynb"


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell printed, without what may differ from machine to machine: numbers, and which components."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in cells]
    return [re.sub(r"(layer\d+\.\w+\W*)+|\d[\d,.]*", "#", text) for text in texts]


@pytest.mark.slow
def test_tutorial_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))
    shown = nbformat.read(TUTORIAL, as_version=4)
    executed = copy.deepcopy(shown)
    NotebookClient(executed, timeout=200, resources={"metadata": {"path": str(TUTORIAL.parent)}}).execute()
    assert printed(executed) == printed(shown), "run it anew: .venv/bin/jupyter execute --inplace docs/tutorial.ipynb"


def test_notebook_becomes_text_code_and_what_was_printed():
    warned = {"output_type": "stream", "name": "stderr", "text": ["beware\n"]}
    said = {"output_type": "stream", "name": "stdout", "text": ["1\n", "2\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": ["print(1)\n", "print(2)"], "outputs": [warned, said]},
    ]
    page = "# Title\nText.\n\n```python\nprint(1)\nprint(2)\n```\n\n``` {.text .output}\n1\n2\n```\n"
    assert notebook_page({"cells": cells}) == page


def test_links_of_the_readme_and_to_notebooks_lead_to_pages():
    assert first_page("[a](docs/a.md#b) ![c](docs/c.png) docs/") == "[a](a.md#b) ![c](c.png) docs/"
    assert on_page_markdown("[a](tutorial.ipynb) `b.ipynb`") == "[a](tutorial.md) `b.ipynb`"


def test_reference_has_each_package_and_its_modules():
    pages = reference()
    assert {"rap_env", "rap_env.llm", "rap_env.evaluation.tasks", "agents"} <= pages.keys()
    assert next(iter(pages)) == "rap_env" and "[`load_llm`][rap_env.llm.loading.load_llm]" in pages["rap_env"]
    modules = {line.removeprefix("::: ") for page in pages.values() for line in page.splitlines() if line[:1] == ":"}
    files = [path for name in ("rap_env", "agents") for path in (PROJECT / name).rglob("[!_]*.py")]
    assert modules == {".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in files}


@pytest.mark.parametrize("path", sorted((PROJECT / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stored_with_plain_outputs(path):
    outputs = [out for cell in json.loads(path.read_text())["cells"] for out in cell.get("outputs", ())]
    assert outputs and all(out["output_type"] == "stream" for out in outputs)
