"""Masks of a leaderboard are measured on other tasks, and held against those of other agents."""

import json
from pathlib import Path

import pytest

from experiments import carry_over
from experiments.report.carry_over import carry_over_table
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.meter import Meter
from rap_env.llm.loading import load_llm
from rap_env.mask import PruningMask

TASK = "rap_opposites_report"
BOARD = Path(__file__).parents[2] / "results" / "leaderboard.jsonl"


def row(agent: str, masks: list[list[PruningMask]], losses: list[list[float]]) -> dict:
    contexts = [
        [{"widths": list(mask.widths), "loss": 3.0 + loss} for mask, loss in zip(*of_seed, strict=True)]
        for of_seed in zip(masks, losses, strict=True)
    ]
    seeds = list(range(len(masks)))
    return {"results": {"agent": agent, "seeds": seeds, "dense_loss": [3.0] * len(seeds), "contexts": contexts}}


def test_masks_of_every_seed_are_measured_on_the_first_contexts():
    llm = load_llm("tiny", "float32", granularity="group")
    dense = PruningMask.all_kept(llm.shape)
    narrow = [PruningMask.from_widths(llm.shape, [n, *dense.widths[1:]]) for n in (1, 0)]
    evaluator = HarnessEvaluator(TASK, limit=6)
    rows = [
        row("greedy", [[dense, narrow[0]], [narrow[1], dense]], [[0.0, 0.5], [0.7, 0.0]]),
        row("other", [[narrow[0], dense], [dense, dense]], [[0.25, 9.0], [0.5, 9.0]]),
    ]
    results = carry_over.measure(rows, {TASK: Meter(llm, evaluator)}, 1, lambda done, total: None)
    greedy = results["agents"]["greedy"]
    assert greedy["seeds"] == [0, 1] and greedy["loss"] == [[0.0], [pytest.approx(0.7)]]
    assert greedy["measured"][TASK][0][0] == results["dense"][TASK]
    with llm.pruned(narrow[1]):
        expected = evaluator.evaluate(llm)
    assert greedy["measured"][TASK][1][0] == {name: expected.mean(name) for name in ("acc", "smooth_acc")}
    assert results["agents"]["other"]["measured"][TASK][0][0] != results["dense"][TASK]


def test_the_table_holds_agents_against_the_first_two():
    def measured(*of_seeds: float) -> dict:
        return {"recall": [[{"acc": value, "smooth_acc": value / 2}] for value in of_seeds]}

    agents = {
        "greedy": {"seeds": [0, 1], "loss": [[0.5], [0.75]], "measured": measured(0.25, 0.5)},
        "table": {"seeds": [0, 1], "loss": [[0.25], [0.25]], "measured": measured(0.5, 0.5)},
        "learned": {"seeds": [0, 1], "loss": [[0.25], [0.0]], "measured": measured(0.75, 1.0)},
    }
    table = carry_over_table({"results": {"dense": {"recall": {"acc": 1.0, "smooth_acc": 0.5}}, "agents": agents}})
    assert table.columns[2:] == ["mean of 2 seeds and 1 contexts", "minus greedy", "minus table"]
    rows = {tuple(cells[:2]): cells[2:] for cells in table.rows}
    assert rows["loss over dense", "learned"] == ["0.125", "-0.500 [-0.750, -0.250]", "-0.125 [-0.250, 0.000]"]
    assert rows["acc of recall (dense 1.000)", "greedy"] == ["0.375", "", "-0.125 [-0.250, 0.000]"]
    assert rows["smooth_acc of recall (dense 0.500)", "learned"][1] == "0.250"


@pytest.mark.parametrize(("rows", "words"), [("", "at least one row"), ('{"results": {}}\n', "a record needs config")])
def test_what_is_no_leaderboard_is_refused(tmp_path, rows, words):
    (tmp_path / "board.jsonl").write_text(rows)
    with pytest.raises(SystemExit, match=words):
        carry_over.main(
            [str(tmp_path / "board.jsonl"), str(tmp_path / "record.json"), "--tasks", TASK, "--agents", "a"]
        )
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--agents", "family_surrogate", "--contexts", "33"), "expected 1 to 32 contexts.*got 33"),
        (("--agents", "family_surrogate", "--contexts", "0"), "expected 1 to 32 contexts.*got 0"),
        (("--agents", "ppo"), "unknown agent of the leaderboard 'ppo'"),
    ],
)
def test_what_could_not_be_compared_is_refused_before_anything_is_measured(tmp_path, options, words):
    with pytest.raises(SystemExit, match=words):
        carry_over.main([str(BOARD), str(tmp_path / "record.json"), "--tasks", TASK, *options])


def test_agents_with_other_seeds_are_refused(tmp_path):
    rows = [json.loads(line) for line in BOARD.read_text().splitlines()]
    for key in ("seeds", "tokens", "dense_loss", "contexts"):
        rows[0]["results"][key] = rows[0]["results"][key][1:]
    (tmp_path / "board.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    agents = [rows[0]["results"]["agent"], "single_site_greedy"]
    with pytest.raises(SystemExit, match="expected agents with the same seeds"):
        carry_over.main([str(tmp_path / "board.jsonl"), str(tmp_path / "r.json"), "--tasks", TASK, "--agents", *agents])
