"""The command that measures a table."""

import pytest

from experiments.serving_table import even_ladder, main
from rap_env.llm.loading import load_llm
from rap_env.serving.tables import ServingTable


def test_an_even_ladder_keeps_as_much_of_each_site():
    llm = load_llm("tiny", granularity="group")
    ladder = even_ladder(llm, (1.0, 0.5), (0.0, 1.0), "made up")
    whole, half = ladder.masks
    assert ladder.names == ("100%", "50%") and not whole.dropped
    assert half.widths == tuple(round(0.5 * n) for n in whole.widths)


def test_a_table_is_measured_written_and_not_written_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path / "cache"))  # for the weights' file
    path = tmp_path / "table.json"
    arguments = [
        str(path),
        "--model",
        "tiny",
        "--shares",
        "1",
        "0.5",
        "--losses",
        "0",
        "0.7",
        "--losses-are",
        "made up",
        "--repeats",
        "1",
    ]
    main(arguments)
    table = ServingTable.load(path)
    assert [level.loss_over_dense for level in table.levels] == [0.0, 0.7] and table.measured["losses"] == "made up"
    assert "held_out_steps: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(arguments)
    assert "tables are not written over" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other.json"), "--shares", "1", "0.5"])
    assert "expected a loss for each of the 2 shares; there are 8" in capsys.readouterr().err
