"""Tables answer measured masks with what was measured, others with a prediction, and stand where a model stands."""

import numpy as np
import pytest
import torch

from rap_env.errors import InvalidMask, InvalidTable, InvalidWorkload
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.simulator import lowest_losses
from rap_env.evaluation.table import ScoreTable, load_tables, save_tables
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.evaluation.table_cases import DENSE_LOSS, loss_of, tiny_tables, write_tiny_tables


@pytest.fixture
def model(tmp_path):
    return load_tables(str(write_tiny_tables(tmp_path)))


def mask_of(model, *widths: int) -> PruningMask:
    return PruningMask.from_widths(model.shape, widths)


def test_measured_masks_have_their_measured_loss(model):
    table = model.evaluator.table
    for widths, loss in zip(table.widths, table.losses, strict=True):
        assert table.look_up([mask_of(model, *widths)]) == [(float(loss), True)]


def test_other_masks_have_a_prediction_that_is_close(model):
    known = set(map(tuple, model.evaluator.table.widths.tolist()))
    others = [widths for widths in np.ndindex(*(2,) * 8) if widths not in known and sum(widths) >= 4]
    found = model.evaluator.table.look_up([mask_of(model, *widths) for widths in others])
    assert len(others) > 20 and not any(is_measured for _loss, is_measured in found)
    off = [loss - loss_of(widths) for (loss, _), widths in zip(found, others, strict=True)]
    assert np.mean(np.abs(off)) < 0.3 * np.std([loss_of(widths) for widths in others])


def test_nothing_is_predicted_to_be_better_than_what_was_measured_with_as_little():
    n_parts, is_attention = np.array([3, 3]), np.array([True, False])
    widths, losses = np.array([[3, 3], [1, 2], [2, 1]]), np.array([1.0, 2.0, 5.0])
    floor = lowest_losses(widths, losses, n_parts, is_attention)
    assert floor[3, 3] == 1.0
    assert floor[1, 2] == floor[2, 2] == floor[3, 2] == floor[1, 3] == 2.0
    assert floor[2, 1] == floor[3, 1] == 5.0
    assert floor[1, 1] == floor[0, 3] == -np.inf


def test_a_table_evaluates_as_a_text_does(model):
    meter = Meter(model, model.evaluator)
    dense = PruningMask.all_kept(model.shape)
    (evaluation,) = meter.evaluate([dense])
    assert evaluation.score == pytest.approx(-DENSE_LOSS)
    metrics = evaluation.tasks["table of toy"]
    assert metrics["loss"] == -evaluation.score and metrics["measured"] == 1 and metrics["items"] == 2
    assert meter.tokens_each == 32 and meter.budget.spent == 32


def test_an_evaluator_by_text_is_answered_by_the_table_of_as_many_tokens(model):
    windows = torch.zeros((2, 16), dtype=torch.long)
    dense = PruningMask.all_kept(model.shape)
    whole, first = (
        Meter(model, PerplexityEvaluator(part, "calibration")).evaluate([dense])[0] for part in (windows, windows[:1])
    )
    assert whole.score == pytest.approx(-DENSE_LOSS) and first.score == pytest.approx(-DENSE_LOSS - 1.0)
    assert Meter(model, PerplexityEvaluator(windows, "calibration")).owner != Meter(model, model.evaluator).owner
    with pytest.raises(InvalidWorkload, match=r"no table of 48 tokens an evaluation; there are tables of \[16, 32\]"):
        Meter(model, PerplexityEvaluator(torch.zeros((3, 16), dtype=torch.long), "calibration"))


def test_identity_names_the_file_and_the_table(model, tmp_path):
    identity = model.evaluator.identity
    again = load_tables(str(tmp_path / "toy.npz")).evaluator.identity
    assert identity == again and identity["evaluator"] == "table" and len(identity["table"]) == 64
    tables, about = tiny_tables()
    changed = [ScoreTable(one.widths, one.losses + 1, one.simulator, one.about) for one in tables]
    save_tables(tmp_path / "other.npz", changed, about)
    assert load_tables(str(tmp_path / "other.npz")).evaluator.identity["table"] != identity["table"]


def test_masks_of_other_models_are_refused(model):
    other = build_tiny_llm(n_layers=2)
    with pytest.raises(InvalidMask, match="expected a mask over this table's 8 components; got 4"):
        model.check(PruningMask.all_kept(other.shape))


def test_files_that_are_no_tables_are_refused(tmp_path):
    with pytest.raises(InvalidTable, match=r"nothing.npz: not tables of .* \(the package has smollm2-135m\)"):
        load_tables(str(tmp_path / "nothing.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InvalidTable, match=r"text.npz: not tables"):
        load_tables(str(tmp_path / "text.npz"))
    with pytest.raises(FileExistsError):
        save_tables(tmp_path / "text.npz", *tiny_tables())


def test_other_parts_than_the_first_count_as_the_first():
    model = load_tables()
    dense = PruningMask.all_kept(model.shape)
    first, last = (dense.drop(dense.components[place]) for place in (2, 0))
    assert last.nested != last and last.nested == first
    assert model.evaluator.table.look_up([last]) == model.evaluator.table.look_up([first])


def test_what_ships_holds_thousands_of_masks_of_the_embedded_model():
    model = load_tables()
    assert len(model.shape.components) == 810 and len(model.shape.sites) == 60
    assert [table.about["tokens"] for table in model.tables] == [1024, 256]
    assert all(len(table.losses) > 5000 for table in model.tables)
    assert model.preparation.tokens == 16384 and len(model.preparation.scores["flap"]) == 810
    dense, of_dense = PruningMask.all_kept(model.shape), model.tables[0].simulator.dense_loss
    assert model.tables[0].look_up([dense]) == [(of_dense, True)]
