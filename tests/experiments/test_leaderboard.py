"""Rows of the leaderboard are what records say, can be checked by others, and are refused where they prove nothing."""

import copy
import json
import re
from pathlib import Path

import pytest

from experiments import validate
from experiments.leaderboard.checks import TOLERANCE, overridden
from experiments.leaderboard.rows import Tuning, mask_of
from experiments.records import read_record, read_records
from rap_env.errors import InvalidConfig
from rap_env.llm.loading import load_llm
from rap_env.mask import PruningMask
from scripts import enter_leaderboard

COMMIT = "0123456789abcdef"
FAMILY = (
    *("model=tiny", "model.granularity=group", "tracker=none", "reward=loss", "workload=family", "evaluation=text"),
    *("calibration=search", "calibration.n_samples=2", "calibration.tokens_per_sample=24", "calibration.removals=2"),
    *("widths.n_samples=4", "widths.tokens_per_sample=48", "decisions=4", "agent=random_search"),
    *("evaluation.search_windows=[2,32]", "evaluation.report_windows=[2,32]", "evaluation.seed=${seed}"),
    *("workload.search.n=3", "workload.report.n=4", "workload.report.n_outside=2"),
    *("workload.sampler.prompt_tokens=[64,512]", "workload.report.wider.prompt_tokens=[32,1024]"),
)
CONTEXTS = 4 + 2


def words(name: str, path: Path) -> Path:
    path.write_text(" ".join(f"{name}{number}" for number in range(600)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("leaderboard")
    words("searched", folder / "valid.txt")
    words("reported", folder / "test.txt")
    return folder


@pytest.fixture(scope="module")
def made(folder, train_here) -> list[dict]:
    """Records of one agent with two seeds under two token budgets, as of a clean commit."""
    texts = (f"evaluation.search_paths=[{folder / 'valid.txt'}]", f"evaluation.report_paths=[{folder / 'test.txt'}]")
    records = []
    for seed in range(2):
        for budget in (1500, 3000):
            to = folder / f"{seed}-{budget}"
            asked = (f"seed={seed}", f"token_budget={budget}", f"hydra.run.dir={to}")
            said, code = train_here(folder / "cache", *FAMILY, *texts, *asked)
            assert not code, code or said
            records.append(read_record(to / "record.json"))
            records[-1]["provenance"]["git"] = {"commit": COMMIT, "dirty": False}
    return records


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("RAP_CACHE", str(folder / "cache"))


@pytest.fixture
def records(made) -> list[dict]:
    return copy.deepcopy(made)


@pytest.fixture
def enter(tmp_path, capsys):
    """Enters records into a table of this test; what was said, or what was refused."""

    def run(records: list[dict], *options: str, agent: str = "random_search") -> str:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        of_tuning = ("--tuned-on", "nothing", "--tuning-tokens", "0")
        try:
            enter_leaderboard.main([str(path), agent, str(tmp_path / "board.jsonl"), *of_tuning, *options])
        except SystemExit as stopped:
            return str(stopped.code)
        return capsys.readouterr().out

    return run


@pytest.fixture
def checked(tmp_path, capsys):
    """What validate says of changed rows: its output, and the error that it ends with."""

    def run(change, *options: str) -> tuple[str, str]:
        rows = read_records(tmp_path / "board.jsonl")
        for row in rows:
            change(row)
        path = tmp_path / "changed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        try:
            validate.main([str(path), *options])
        except SystemExit as stopped:
            return capsys.readouterr().out, str(stopped.code)
        return capsys.readouterr().out, ""

    return run


@pytest.fixture
def texts(folder) -> tuple[str, str]:
    """Where a reader has the texts: rows name them without folders."""
    return f"evaluation.search_paths=[{folder / 'valid.txt'}]", f"evaluation.report_paths=[{folder / 'test.txt'}]"


def shape():
    """That of the records' model, whose parts are called otherwise there: they are in another order."""
    return load_llm("tiny", "float32", granularity="group").shape


def test_a_row_holds_what_the_records_of_its_token_budget_say(records, enter, tmp_path):
    entered = [f"entered: random_search ({budget} tokens), 2 seeds" for budget in ("1,500", "3,000")]
    assert enter(records).splitlines() == entered
    rows = read_records(tmp_path / "board.jsonl")
    for row, of_budget in zip(rows, (records[0::2], records[1::2]), strict=True):
        results = row["results"]
        assert (results["agent"], results["tuned_on"], results["tuning_tokens"]) == ("random_search", "nothing", 0)
        assert results["seeds"] == [0, 1] and row["provenance"]["git"] == {"commit": COMMIT, "dirty": False}
        assert results["tokens"] == [record["results"]["search"]["tokens"] for record in of_budget]
        assert results["dense_loss"] == [-record["results"]["dense"]["text"] for record in of_budget]
        for contexts, record in zip(results["contexts"], of_budget, strict=True):
            assert len(contexts) == CONTEXTS
            for context, reported in zip(contexts, record["results"]["rows"], strict=True):
                assert context["loss"] == -reported["reports"]["text"]["score"]
                assert all(context[key] == reported[key] for key in ("batch_size", "prompt_tokens", "budget_bytes"))
                dropped = [name.partition("@")[0] for name in reported["dropped"]]
                mask = mask_of(context, shape())
                assert [component.name for component in mask.dropped] == dropped
    evaluation = rows[0]["config"]["evaluation"]
    assert (evaluation["search_paths"], evaluation["report_paths"]) == (["valid.txt"], ["test.txt"])


def test_masks_that_keep_other_parts_than_the_first_are_told_by_what_they_drop():
    dense, first = PruningMask.all_kept(shape()), shape().components[0].name
    assert mask_of({"dropped": [first]}, shape()) == dense.drop(first)
    assert mask_of({"widths": dense.widths}, shape()) == dense


def test_rows_can_be_checked_by_who_has_the_texts_elsewhere(records, enter, checked, texts):
    enter(records)
    said, error = checked(lambda row: None, *texts)
    assert error == "" and "2 rows: 24 masks held against their budgets; 12 losses measured again" in said
    said, _error = checked(lambda row: None, *texts, "--sample", "1")
    assert "8 losses measured again" in said, "the dense model and one mask, of two rows and two seeds"
    _said, error = checked(lambda row: None)
    assert "say where the texts lie: evaluation.search_paths=[FILE]" in error


def raise_loss(row: dict) -> None:
    for contexts in row["results"]["contexts"]:
        for context in contexts:
            context["loss"] += 2 * TOLERANCE


def keep_all(row: dict) -> None:
    row["results"]["contexts"][1][2]["widths"] = list(PruningMask.all_kept(shape()).widths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (raise_loss, r"random_search (1,500 tokens), seed 0, context"),
        (raise_loss, f"they may differ by {TOLERANCE}"),
        (
            lambda row: row["results"].update(dense_loss=[0.0, 0.0]),
            "seed 0, dense model: the row states a loss of 0.0000",
        ),
        (keep_all, "seed 1, context 3: its mask needs"),
        (lambda row: row["results"]["contexts"][0][0].update(widths=[1]), "context 1: expected 8 widths, one for each"),
        (lambda row: row["results"]["tokens"].append(row["results"]["tokens"].pop() + 3000), "seed 1 has spent"),
        (lambda row: row["config"]["workload"]["search"].update(first=3), "3 of its contexts were searched on"),
        (lambda row: row["config"]["workload"]["report"].update(seed=1), "expected the 6 contexts that its config"),
        (lambda row: row["results"].update(report_windows="0" * 64), "windows with the digest 000000000000; those of"),
        (lambda row: row["results"].update(token_budget=7), "several of random_search (7 tokens)"),
        (lambda row: row["results"].pop("tuned_on"), "expected a row of a leaderboard; it lacks tuned_on"),
        (lambda row: row["results"]["seeds"].pop(), "of the same seeds, at least one"),
        (lambda row: row["results"]["contexts"][1].pop(), "expected the same contexts for all seeds"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(change, message, records, enter, checked, texts):
    enter(records)
    assert message in checked(change, *texts)[1]


def test_a_tolerance_is_an_option(records, enter, checked, texts):
    enter(records)
    assert checked(raise_loss, *texts, "--tolerance", str(3 * TOLERANCE))[1] == ""


def test_a_model_that_is_not_what_it_was_is_measured_all_the_same(records, enter, checked, texts):
    enter(records)
    said, error = checked(lambda row: row["provenance"].update(model_digest="0" * 64), *texts)
    assert error == "" and said.startswith("note: the model is not to the last bit that of the rows")


def test_another_report_text_is_refused_before_anything_is_measured(records, enter, checked, texts, tmp_path):
    enter(records)
    other = words("other", tmp_path / "other.txt")
    assert (
        "evaluation.report_paths names other files"
        in checked(lambda row: None, texts[0], f"evaluation.report_paths=[{other}]")[1]
    )


def every(*path: str, **entries):
    """Changes all records below a path."""

    def change(records: list[dict]) -> None:
        for record in records:
            node = record
            for key in path:
                node = node[key]
            node.update(entries)

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (every("provenance", git={"commit": COMMIT, "dirty": True}), "expected records of one commit without changes"),
        (every("provenance", git=None), "which others can run; got null"),
        (
            lambda all: every("provenance", git={"commit": "f", "dirty": False})(all[:1]),
            "of one commit without changes",
        ),
        (
            every("config", "workload", "report", _target_="rap_env.memory.scenario.scenario_grid"),
            "of a context family",
        ),
        (lambda all: all.append(all[0]), "several of seed 0 with 1,500 tokens"),
        (lambda all: all[0]["config"].update(agent={"_target_": "other"}), "token budget; their agent differs"),
        (lambda all: all[0]["results"]["rows"].pop(), "seed and token budget; their contexts differs"),
        (every("config", "workload", "search", first=3), "3 of its contexts were searched on"),
        (every("provenance", model_digest="0" * 64), "the model is not what it was in"),
        (every("results", "dense", text=-1.0), "dense model: the row states a loss of 1.0000"),
    ],
)
def test_records_that_prove_nothing_are_refused(spoil, message, records, enter, tmp_path):
    spoil(records)
    assert message in enter(records)
    assert not (tmp_path / "board.jsonl").exists()


def test_search_text_that_is_reported_on_is_refused(records, enter, tmp_path):
    (tmp_path / "letters.txt").write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 20)
    texts = [f"evaluation.{half}_paths=[{tmp_path / 'letters.txt'}]" for half in ("search", "report")]
    assert "overlaps with" in enter(records, *texts)


def test_records_on_another_text_are_refused_with_the_first_of_many_faults(records, enter, folder):
    said = enter(records, f"evaluation.report_paths=[{folder / 'valid.txt'}]")
    assert "seed 0, dense model: the row states a loss of" in said and re.search(r"; and \d+ more$", said)


def test_an_agent_that_is_not_there_or_stands_there_already_is_refused(records, enter):
    assert "unknown agent in the records 'random'; did you mean random_search?" in enter(records, agent="random")
    enter(records)
    assert "one row for each agent and token budget; there are several of random_search (1,500" in enter(records)


def test_rows_of_another_family_are_refused(records, enter, tmp_path):
    enter(records)
    board = tmp_path / "board.jsonl"
    rows = read_records(board)
    for row in rows:
        row["config"]["widths"]["score"] = "flap"
        row["results"]["agent"] = "other"
    board.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "expected rows of one context family; random_search (1,500 tokens) differs from other" in enter(records)


def test_a_token_budget_that_changed_nothing_is_no_row(records, enter):
    for record in records:
        record["results"] |= copy.deepcopy(records[0]["results"]) | {"seed": record["results"]["seed"]}
    for record, budget in zip(records, (1500, 3000) * 2, strict=True):
        record["results"]["search"] = record["results"]["search"] | {"token_budget": budget}
    assert enter(records) == "entered: random_search (1,500 tokens), 2 seeds\n"


@pytest.mark.parametrize(("on", "tokens"), [(" ", 0), ("nothing", -1)])
def test_tuning_has_to_be_told(on, tokens):
    with pytest.raises(InvalidConfig, match="expected what the agent was tuned on"):
        Tuning(on, tokens)


@pytest.mark.parametrize("override", ["evaluation.report_path=[x]", "evaluation.report_paths", "other=1"])
def test_overrides_name_entries(override):
    with pytest.raises(InvalidConfig, match=r"expected (an entry of the row's config|KEY=VALUE)"):
        overridden({"evaluation": {"report_paths": ["a"]}}, [override])
