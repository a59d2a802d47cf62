"""The table of rewards: gains over the greedy order, at home and elsewhere."""

import pytest

from experiments.report.rewards import carry_over_rewards_table


def made(name: str, agent: str, seed: int, home: float, public: float) -> dict:
    row = {"reports": {"home": {"tasks": {"a": {"acc": home - 0.1}, "b": {"acc": home + 0.1}}}}}
    row["reports"]["public"] = {"tasks": {"piqa": {"acc": public}}}
    dense = {"home": 0.9, "public": 0.4 if name == "text" else 0.5}
    return {"config": {"name": name}, "results": {"agent": agent, "seed": seed, "rows": [row, row], "dense": dense}}


def test_gains_are_held_against_the_greedy_order_of_the_same_name():
    records = [made("smooth", "greedy_gsi", 0, 0.6, 0.4), made("text", "greedy_gsi", 0, 0.5, 0.4)]
    records += [made("smooth", "surrogate", seed, 0.7 + 0.1 * seed, 0.42 + 0.04 * seed) for seed in (0, 1)]
    records += [made("text", "surrogate", 0, 0.4, 0.5)]
    table = carry_over_rewards_table(records)
    assert table.rows == [
        ["smooth", "greedy_gsi", "1", "0.600", "", "", "0.400", "", "", ""],
        [
            "smooth",
            "surrogate",
            "2",
            "0.750",
            "0.150 [0.100, 0.200]",
            "50%",
            "0.440",
            "0.040 [0.020, 0.060]",
            "40%",
            "0.27",
        ],
        ["text", "greedy_gsi", "1", "0.500", "", "", "0.400", "", "", ""],
        ["text", "surrogate", "1", "0.400", "-0.100", "-25%", "0.500", "0.100", "", ""],  # greedy loses nothing there
    ]


def test_a_name_without_the_greedy_order_is_refused():
    with pytest.raises(ValueError, match="expected runs of greedy_gsi among those of text; there are surrogate"):
        carry_over_rewards_table([made("text", "surrogate", 0, 0.4, 0.5)])
