"""Contexts of kinds of text in reports: what each kind loses is held against the dense model on that kind."""

import pytest

from experiments.records import dense_scores
from experiments.report.amortisation import Amortisation
from experiments.report.comparison import draws_own_text, without_draws
from experiments.report.kinds import family_kinds_table
from tests.experiments.test_amortisation import made

KINDS = ("code", "prose", "code", "prose")
DENSE = {"code": -1.0, "prose": -2.0}


def of_kinds(agent: str, seed: int, budget: int, losses: tuple[float, ...]) -> dict:
    """A record whose contexts have kinds; the dense model loses 1 on code and 2 on prose, 1.5 on the whole."""
    found = made(agent, seed, budget, losses, budget)
    results = found["results"]
    main = results["evaluators"][0]
    results["dense"][main] = -1.5
    dense = []
    for row, kind, loss in zip(results["rows"], KINDS, losses, strict=True):
        row["kind"] = kind
        row["reports"][main]["score"] = -loss
        dense.append(row | {"reports": {main: row["reports"][main] | {"score": DENSE[kind]}}})
    results["references"] = {**results["references"], "dense": dense}
    return found


@pytest.fixture
def records() -> list[dict]:
    knowing = [of_kinds("knowing", seed, 100, (1.5 + 0.1 * seed, 2.6, 3.0, 4.0)) for seed in (0, 1)]
    return [*knowing, *(of_kinds("blind", seed, 200, (1.9 + 0.1 * seed, 2.5, 3.0, 4.0)) for seed in (0, 1))]


def test_losses_are_over_the_dense_model_on_the_contexts_own_kind(records):
    assert dense_scores(records[0]["results"], records[0]["results"]["evaluators"][0]) == [-1.0, -2.0, -1.0, -2.0]
    table = family_kinds_table(records)
    assert table.columns == ["agent", "token budget", "seeds", "held-out loss over dense", "code", "prose"]
    knowing, blind, difference = table.rows
    assert knowing == ["knowing", "100", "2", "0.575 [0.550, 0.600]", "0.550 [0.500, 0.600]", "0.600"]
    assert blind == ["blind", "200", "2", "0.725 [0.700, 0.750]", "0.950 [0.900, 1.000]", "0.500"]
    assert difference == ["blind minus knowing", "200", "2 of 2 above 0", "0.150", "0.400", "-0.100"]
    losses = {entry.agent: entry.held_out[0] for entry in Amortisation(records).entries}
    assert losses == pytest.approx({"knowing": 0.575, "blind": 0.725})


def test_contexts_without_kinds_have_no_such_table():
    with pytest.raises(ValueError, match="contexts that are each of a kind of text"):
        family_kinds_table([made("a", 0, 100, (2.4, 2.8, 4.0, 5.0), 50)])


def test_a_kind_may_draw_its_text_by_the_runs_seed():
    evaluation = {"kinds": {"code": {"seed": 3, "search_windows": 2}, "prose": {"seed": 3}}}
    record = {"config": {"evaluation": evaluation}, "results": {"seed": 3}}
    assert draws_own_text(record) and not draws_own_text(record | {"results": {"seed": 2}})
    assert without_draws(evaluation) == {"kinds": {"code": {"search_windows": 2}, "prose": {}}}
