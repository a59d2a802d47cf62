"""The comparison of learners with rules: its intervals, its gate, and its record."""

import numpy as np
import pytest

from experiments.records import read_record
from experiments.serving_learners import RIVAL, _wins, compare, main, paired_difference
from rap_env.errors import InvalidConfig
from rap_env.serving.tables import embedded_table


def test_an_interval_of_equal_differences_is_a_point():
    rival = np.arange(5.0)
    assert paired_difference(np.stack([rival + 0.5] * 3), rival) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_an_interval_is_as_wide_as_seeds_and_episodes_say():
    rng = np.random.default_rng(1)
    rival = rng.normal(size=400)
    found = paired_difference((rival + rng.normal(0.0, 0.2, 400))[None], rival)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)
    seeds = np.array([[-1.0], [0.0], [1.0]]) + rival
    found = paired_difference(seeds, rival)
    assert (found["low"], found["high"]) == (-1.0, 1.0) and found["mean"] == pytest.approx(0.0)


def test_the_gate_needs_an_interval_above_zero_and_enough_seeds_and_episodes():
    rival = np.zeros(100)
    better = np.full((3, 100), 0.1)
    assert _wins(better, rival)
    assert not _wins(better[:2], rival) and not _wins(better[:, :99], rival[:99]) and not _wins(-better, rival)


@pytest.mark.slow
def test_a_run_writes_one_record_with_all_that_it_compared(tmp_path, capsys):
    path = tmp_path / "record.json"
    arguments = [str(path), "--seeds", "0", "1", "--tuning-episodes", "1", "--held-out-episodes", "2"]
    main([*arguments, "--ppo-steps", "64", "--dqn-steps", "64", "--recurrent-ppo-steps", "0"])
    record = read_record(path)
    policies = record["results"]["policies"]
    assert {"ppo", "dqn", RIVAL, "clairvoyant", "greedy by table", "static 100%", "static 30%"} <= set(policies)
    assert np.shape(policies["ppo"]["reward"]) == (2, 2) and np.shape(policies[RIVAL]["reward"]) == (1, 2)
    assert policies[RIVAL]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert record["results"]["wins"] == {"ppo": False, "dqn": False}
    assert record["config"]["seeds"] == [0, 1] and record["config"]["table"]["measured"]["model"] == "smollm2-135m"
    assert "does not win" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(arguments)
    assert "records are written once" in capsys.readouterr().err


def test_nothing_to_compare_is_refused():
    with pytest.raises(InvalidConfig, match="expected at least one episode to tune on"):
        compare(embedded_table(), {}, [0], 1, 1)
