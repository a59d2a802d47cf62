"""Online calibration and the walk over thresholds are compared on the same queries, and the record is written once."""

import json

import numpy as np
import pytest

from experiments.report.selection import selection_calibration_table
from experiments.selection_calibration import main
from rap_env.rerank.synthetic import synthetic_paths


def test_thresholds_of_both_decide_on_the_reported_queries(tmp_path, capsys):
    paths = synthetic_paths(12, n_candidates=12, n_layers=6)
    file = paths.save(tmp_path / "paths.npz")
    main([str(file), str(tmp_path / "record.json"), "--starts", "0.1", "1e9", "--orders", "2"])
    record = json.loads((tmp_path / "record.json").read_text())
    rows = record["results"]["rows"]
    assert [(row["top_k"], row["start"], len(row["thresholds"])) for row in rows] == [
        (k, start, n) for k in (1, 5, 10) for start, n in ((None, 1), (0.1, 2), (1e9, 2))
    ]
    assert [len(record["config"]["split"][part]) for part in ("training", "report")] == [8, 4]
    never = next(row for row in rows if row["start"] == 1e9)
    assert never["report"]["compute"] == [1.0, 1.0]  # 8 queries lower it by a factor of 1.14
    np.testing.assert_allclose(never["thresholds"], 1e9 * np.exp(2 * 8 * (0.992 - 1)))
    assert all(0 < value <= 1 for row in rows for value in row["report"]["compute"])
    assert selection_calibration_table(record).rows[0][:2] == ["1", "the walk"]
    assert "\n| 10 | online, from 1e+09 | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(file), str(tmp_path / "record.json")])
