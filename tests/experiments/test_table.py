"""From evaluations of a store to a table, and from runs to an agreement of orders."""

import numpy as np
import pytest

from experiments.table import fitted_table, table_of
from experiments.table_agreement import agreement, errors, without
from rap_env.errors import InvalidTable
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.table import load_tables
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.evaluation.table_cases import LOSSES, write_tiny_tables

IDENTITY = {"engine": 1, "model": "m", "kind": "evaluation", "evaluator": {"evaluator": "perplexity", "windows": "w"}}
SHAPE = build_tiny_llm().shape


def found(dropped, score, **changes):
    evaluator = IDENTITY["evaluator"] | {"name": "any"}
    return IDENTITY | {"evaluator": evaluator, "dropped": dropped} | changes, {"score": score}


def test_all_evaluations_of_one_identity_are_taken_whatever_they_were_called():
    rows = [
        found([], -1.0),
        found(["layer0.mlp@abc"], -2.0),
        found(["layer0.mlp"], -2.01, model="the same"),
        found(["layer1.mlp"], -9.0, model="another"),
        found(["layer1.mlp"], -9.0, engine=2),
        found(["layer1.mlp"], -9.0, evaluator={"evaluator": "divergence", "windows": "w"}),
        found(["layer9.mlp"], -9.0),
    ]
    losses, about = table_of(iter(rows), IDENTITY | {"dropped": []}, SHAPE, ["the same"])
    assert losses == {(1,) * 8: 1.0, (1, 0, *(1,) * 6): 2.0}
    assert about["skipped"] == 1 and len(about["identities"]) == 2
    assert about["twice"] == {"masks": 1, "largest_difference": pytest.approx(0.01)}


def test_evaluations_that_contradict_each_other_are_refused():
    rows = [found([], -1.0), found([], -1.2)]
    with pytest.raises(InvalidTable, match=r"equal losses for equal masks; they differ by up to 0\.200 nats"):
        table_of(iter(rows), IDENTITY, SHAPE, [])
    with pytest.raises(InvalidTable, match="expected the dense model among the evaluations"):
        fitted_table({(1, 0, *(1,) * 6): 2.0}, SHAPE, {})


def test_a_store_hands_out_what_holds_a_text(tmp_path):
    with ResultStore(tmp_path / "results.db") as store:
        for windows in ("one", "two"):
            store.put({"windows": windows}, {"score": len(windows)})
        assert list(store.evaluations("two")) == [({"windows": "two"}, {"score": 3})]


def test_agents_are_ordered_by_their_means_over_seeds():
    def run(agent, model, table):
        of_table = {way: {"loss": loss} for way, loss in zip(("same_seed", "other_seed", "without_own"), table)}  # noqa: B905
        return {"agent": agent, "model": model, "model_report": -model, **of_table}

    runs = [run("a", 1.0, (1, 3, 1)), run("a", 3.0, (3, 5, 1)), run("b", 3.0, (2.5, 2, 2)), run("c", 4.0, (9, 3, 0))]
    made = agreement(runs)
    assert made["agents"] == ["a", "b", "c"] and made["model"] == [2.0, 3.0, 4.0]
    assert made["same_seed"] == {"losses": [2, 2.5, 9], "tau": pytest.approx(1.0), "tau_report": pytest.approx(-1.0)}
    assert made["other_seed"]["tau"] == pytest.approx(-1 / 3)  # 4, 2, 3: one pair of three in order
    assert made["without_own"]["tau"] == pytest.approx(-1 / 3)  # 1, 2, 0


def test_errors_are_of_masks_that_were_left_out(tmp_path):
    model = load_tables(str(write_tiny_tables(tmp_path)))
    made = errors(model.tables[0], least=2)
    assert made["random"]["masks"] == len(LOSSES) and made["random"]["mean_absolute"] > 0.0
    assert made["random"]["r2_of_logarithms"] > 0.9


def test_a_table_without_masks_predicts_them(tmp_path):
    model = load_tables(str(write_tiny_tables(tmp_path)))
    gone = PruningMask.from_widths(model.shape, next(w for w in sorted(LOSSES) if 0 < sum(w) < 8))
    less = without(model, [gone, PruningMask.all_kept(model.shape)])
    (loss, is_measured), (_loss, dense_is_measured) = less.tables[0].look_up([gone, PruningMask.all_kept(model.shape)])
    assert not is_measured and dense_is_measured and np.isfinite(loss)
    assert less.evaluator.identity["table"] != model.evaluator.identity["table"]
