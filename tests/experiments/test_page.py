"""The page holds every figure, repeats itself to the bit, and a browser draws it without loading anything."""

import json
import re
import shutil

import pytest

from experiments import report
from experiments.comparison import Comparison
from experiments.figures import exhibits
from experiments.page import page, write_page
from experiments.records import write_record
from scripts.page_pictures import browser_is_installed, draw, headless_chromium
from tests.experiments.comparison_records import record, records, row

FIGURES = [
    *("score_text", "score_tasks", "regret", "attention_share"),
    *("kept_greedy", "kept_learned", "kept_random", "anytime", "quality", "learning"),
]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison.of(records())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that keeps what pages say and ask for."""
    if not browser_is_installed():
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    with headless_chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def opened(browser, comparison, tmp_path_factory):
    browser.get(write_page(comparison, tmp_path_factory.mktemp("page") / "page.html").as_uri())
    return browser


def test_every_figure_is_on_the_page_with_its_title_and_caption(comparison):
    text, shown = page(comparison), exhibits(comparison)
    assert [exhibit.name for exhibit in shown] == FIGURES
    for exhibit in shown:
        assert f"<h2>{exhibit.title}</h2>" in text and f'id="figure-{exhibit.name}"' in text
        assert exhibit.caption and exhibit.figure.data


def test_page_is_the_same_to_the_bit_for_the_same_records():
    assert page(Comparison.of(records())) == page(Comparison.of(json.loads(json.dumps(records()[::-1]))))


def test_page_of_agents_without_episodes_has_no_learning_curves():
    alone = Comparison.of([record("greedy", 0, [row((1, 512), 0.9, 3.0, ["layer0.mlp"])])])
    assert "learning" not in [exhibit.name for exhibit in exhibits(alone)]


def test_names_are_escaped():
    alone = Comparison.of([record("<b>", 0, [row((1, 512), 0.9, 3.0, ["layer0.mlp"])])])
    assert "<td>&lt;b&gt;</td>" in page(alone)


def test_kept_components_show_the_flip(comparison):
    (learned,) = [exhibit.figure for exhibit in exhibits(comparison) if exhibit.name == "kept_learned"]
    shares = [[sum(line) for line in trace.z] for trace in learned.data]
    # attention at 1 x 512 and 16 x 2048, then MLP; a line for each budget, of four layers
    assert shares == [[4, 4], [2, 2], [2, 2], [4, 4]]


def test_violated_budgets_are_gaps(comparison):
    figure = exhibits(comparison)[0].figure
    assert {trace.name for trace in figure.data} == {"greedy", "learned", "random"}


def test_report_prints_the_table_and_writes_the_page(tmp_path, capsys):
    paths = [write_record(tmp_path / f"{number}.json", made) for number, made in enumerate(records())]
    report.main([*map(str, paths), "-o", str(tmp_path / "new" / "page.html")])
    said = capsys.readouterr().out
    assert said.startswith("## toys\n\n| agent | seeds |") and "| learned | 2 |" in said
    assert (tmp_path / "new" / "page.html").read_text() == page(Comparison.of(records()))


def test_report_keeps_comparisons_apart(tmp_path, capsys):
    others = [made | {"config": made["config"] | {"name": "others"}} for made in records()]
    paths = [write_record(tmp_path / f"{n}.json", made) for n, made in enumerate([*records(), *others])]
    report.main([*map(str, paths), "-o", str(tmp_path / "page.html")])
    tables = capsys.readouterr().out.split("## ")[1:]
    assert [table.splitlines()[0] for table in tables] == ["toys", "others"]
    assert (tmp_path / "page-toys.html").read_text() == page(Comparison.of(records()))
    assert (tmp_path / "page-others.html").is_file()


def test_report_refuses_records_that_do_not_belong_together_in_one_line(tmp_path):
    path = str(write_record(tmp_path / "a.json", records()[0]))
    with pytest.raises(SystemExit, match=r"^error: .*several of dense 0$"):
        report.main([path, str(shutil.copy(path, tmp_path / "b.json"))])


def test_browser_draws_every_figure(opened):
    for name in FIGURES:
        plot = opened.find_element("id", f"figure-{name}")
        assert plot.size["width"] > 300 and plot.size["height"] > 150
        drawn = opened.execute_script(
            "return arguments[0].querySelectorAll('.scatterlayer path, .hm image, .heatmaplayer image').length", plot
        )
        assert drawn > 0, name
    assert len(opened.find_elements("css selector", "#merits tbody tr")) == 4


def test_figures_become_pictures(browser, comparison, tmp_path):
    page_path = write_page(comparison, tmp_path / "page.html")
    for path in draw(page_path, tmp_path / "pictures", ["regret", "kept_learned"]):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_browser_has_nothing_to_complain_of(opened):
    assert opened.get_log("browser") == []


def test_browser_loads_nothing_but_the_page(opened):
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in messages if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url.startswith("file:")], "the log is kept"
    assert [url for url in asked if not re.match("file:|data:|blob:|chrome:", url)] == []
    assert opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
