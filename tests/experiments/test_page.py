"""The page holds every figure, repeats itself byte for byte, and a browser draws it without loading anything."""

import json
import re

import pytest

from experiments.records import write_record
from experiments.report import __main__ as report
from experiments.report import benchmark_lines, report_on
from experiments.report.comparison import Comparison
from experiments.report.figures import figures
from experiments.report.page import page, write_page
from rap_env.errors import UnknownName
from scripts.page_pictures import browser_is_installed, draw, headless_chromium
from tests.experiments.comparison_records import record, records, row

FIGURES = [
    *("score_text", "score_tasks", "regret", "attention_share"),
    *("kept_greedy", "kept_learned", "kept_random", "anytime", "quality", "learning"),
]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison(records())


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
    text, shown = page(comparison), figures(comparison)
    assert [one.name for one in shown] == FIGURES
    for one in shown:
        assert f"<h2>{one.title}</h2>" in text and f'id="figure-{one.name}"' in text
        assert one.caption and one.figure.data


def test_page_is_byte_identical_for_the_same_records():
    assert page(Comparison(records())) == page(Comparison(json.loads(json.dumps(records()[::-1]))))


def test_learning_curves_are_means_over_seeds(comparison):
    (curve,) = next(one.figure for one in figures(comparison) if one.name == "learning").data
    assert (list(curve.x), list(curve.y)) == ([16.0, 32.0, 48.0], [-1.0, 0.0, 0.5])


def test_page_of_agents_without_episodes_has_no_learning_curves():
    alone = Comparison([record("greedy", 0, [row((1, 512), 0.9, 3.0, ["layer0.mlp"])])])
    assert "learning" not in [one.name for one in figures(alone)]


def test_names_are_escaped():
    alone = Comparison([record("<b>", 0, [row((1, 512), 0.9, 3.0, ["layer0.mlp"])])])
    assert "<td>&lt;b&gt;</td>" in page(alone)


def test_kept_components_show_the_flip(comparison):
    (learned,) = [one.figure for one in figures(comparison) if one.name == "kept_learned"]
    shares = [[sum(line) for line in trace.z] for trace in learned.data]
    # attention at 1 x 512 and 16 x 2048, then MLP; a line for each budget, of four layers
    assert shares == [[4, 4], [2, 2], [2, 2], [4, 4]]


def test_violated_budgets_are_gaps(comparison):
    figure = figures(comparison)[0].figure
    assert {trace.name for trace in figure.data} == {"greedy", "learned", "random"}


def test_anytime_curves_run_over_tokens(comparison):
    (anytime,) = [one.figure for one in figures(comparison) if one.name == "anytime"]
    curves = {trace.name: (list(trace.x), list(trace.y)) for trace in anytime.data}
    assert curves["learned"] == ([400, 900, 2000], [-4.0, -3.5, -3.5])
    assert curves["greedy"] == ([600, 2000], [pytest.approx(-3.25)] * 2), "from what its ranking cost on"
    assert curves.keys() == {"greedy", "learned", "random"}, "dense never fits"


def test_attention_share_compares_parts_of_each_kind():
    # of 2 attention groups one is dropped, of 4 MLP groups one: a half against a quarter
    made = record("greedy", 0, [row((1, 512), 0.9, 3.0, ["layer0.attention.1", "layer0.mlp.3"])])
    groups = [f"layer0.attention.{part}" for part in range(2)] + [f"layer0.mlp.{part}" for part in range(4)]
    made["results"]["components"] = groups
    shown = {one.name: one.figure for one in figures(Comparison([made]))}
    assert shown["attention_share"].data[0].y == (pytest.approx(2 / 3),)
    attention, mlp = shown["kept_greedy"].data
    assert (list(attention.x), list(mlp.x)) == (["0.0", "0.1"], ["0.0", "0.1", "0.2", "0.3"])
    assert (list(attention.z[0]), list(mlp.z[0])) == ([1, 0], [1, 1, 1, 0])
    axis = shown["kept_greedy"].layout.xaxis
    assert (axis.tickvals, axis.ticktext) == (("0.0",), ("0",)), "a tick at the first part of a layer"


def test_agents_far_off_are_hidden_until_clicked():
    def visible(made: list[dict]) -> dict:
        return {trace.name: trace.visible for trace in figures(Comparison(made))[0].figure.data}

    # interquartile means of the loss over dense: learned 1.0, greedy 1.56, random 5.6
    assert visible(records()) == {"learned": True, "greedy": "legendonly", "random": "legendonly"}
    without = [made for made in records() if made["results"]["agent"] != "learned"]
    assert visible(without) == {"greedy": True, "random": "legendonly"}


def test_page_says_that_records_are_of_several_commits():
    made = records()
    made[0]["provenance"]["git"] = {"commit": "fedcba9876543210", "dirty": False}
    assert "<p>The records are of these commits: 0123456 (5), fedcba9 (1).</p>" in page(Comparison(made))


def write_table(path, made: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    return str(path)


def test_report_prints_the_tables_and_writes_the_page(tmp_path, capsys):
    report.main([write_table(tmp_path / "toys.jsonl", records()), "-o", str(tmp_path / "new" / "page.html")])
    said = capsys.readouterr().out
    assert said.startswith("## toys\n\n| agent | seeds |") and "| learned | 2 |" in said
    assert (tmp_path / "new" / "page.html").read_text() == page(Comparison(records()))


def test_report_without_an_output_writes_no_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report.main([write_table(tmp_path / "toys.jsonl", records())])
    assert "page:" not in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["toys.jsonl"]


def test_report_on_a_single_run_begins_with_its_closing_table():
    lines = report_on(records()[2:3], None)
    assert lines[0].startswith("| policy | budget GB |") and any(line.startswith("| agent |") for line in lines)


def test_report_keeps_comparisons_apart_and_joins_what_has_one_name(tmp_path, capsys):
    write_record(tmp_path / "sweep" / "toys" / "0" / "record.json", records()[0])
    paths = [write_table(tmp_path / "toys.jsonl", records()[1:]), str(tmp_path / "sweep" / "toys")]
    paths.append(write_table(tmp_path / "others.jsonl", records()))
    report.main([*paths, "-o", str(tmp_path / "page.html")])
    tables = capsys.readouterr().out.split("## ")[1:]
    assert [table.splitlines()[0] for table in tables] == ["toys", "others"]
    assert (tmp_path / "page-toys.html").read_text() == page(Comparison(records()))
    assert (tmp_path / "page-others.html").is_file()


def test_report_prints_what_a_benchmark_printed(tmp_path, capsys):
    results = {"peak_bytes": {"gsi": 20_000_000}, "weights_bytes": 80_000_000}
    path = write_record(tmp_path / "memory.json", {"config": {}, "provenance": {}, "results": results})
    report.main([str(path)])
    assert capsys.readouterr().out == "## memory\ngsi: 20 MB, 25% of the weights\n\n"
    with pytest.raises(UnknownName, match="unknown benchmark part 'memori'; did you mean memory"):
        benchmark_lines("memori", {"results": results})


def test_report_refuses_records_that_do_not_belong_together_in_one_line(tmp_path):
    table = write_table(tmp_path / "a.jsonl", [records()[0]] * 2)
    with pytest.raises(SystemExit, match=r"^error: .*several of dense 0$"):
        report.main([table])


def test_browser_draws_every_figure(opened):
    for name in FIGURES:
        plot = opened.find_element("id", f"figure-{name}")
        assert plot.size["width"] > 300 and plot.size["height"] > 150
        drawn = opened.execute_script(
            "return arguments[0].querySelectorAll('.scatterlayer path, .hm image, .heatmaplayer image').length", plot
        )
        assert drawn > 0, name
    assert len(opened.find_elements("css selector", "#metrics tbody tr")) == 4


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
    assert [url for url in asked if not re.match("file:|data:|blob:|chrome(-untrusted)?:", url)] == []
    assert opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
