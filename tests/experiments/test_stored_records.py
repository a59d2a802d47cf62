"""The README's tables are what the stored records say, and the page is the same to the bit each time."""

from pathlib import Path

import pytest

from experiments import report

PROJECT = Path(__file__).parents[2]
COMPARISONS = ["policies"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_readme_shows_the_tables_of_the_records(name, tmp_path, capsys):
    records = [str(path) for path in sorted((PROJECT / "results" / name).glob("*.json"))]
    readme = (PROJECT / "README.md").read_text().splitlines()
    pages = []
    for page in (tmp_path / "one.html", tmp_path / "other.html"):
        report.main([*records, "-o", str(page)])
        pages.append(page.read_bytes())
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(tables) > 20 and set(tables) <= set(readme)
    assert pages[0] == pages[1]
