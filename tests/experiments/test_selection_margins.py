"""The margins that ship with an adapter: the widest that any size and K needs, and what they come to elsewhere."""

import json

import numpy as np
import pytest

from experiments.selection_margins import main
from rap_env.rerank import MarginRule, replay
from rap_env.rerank.calibration import precision
from rap_env.rerank.margins import score_noise
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.synthetic import synthetic_paths


def test_one_rule_is_made_for_all_sizes_and_k(tmp_path, capsys):
    paths = synthetic_paths(30, n_candidates=24, n_layers=6)
    file, record, margins = paths.save(tmp_path / "paths.npz"), tmp_path / "record.json", tmp_path / "margins.json"
    main([str(file), str(record), str(margins), "--sizes", "12", "24", "--target", "0.9"])
    found = json.loads(record.read_text())
    rows, split = found["results"]["rows"], found["config"]["split"]
    assert [(row["candidates"], row["top_k"]) for row in rows] == [(n, k) for n in (12, 24) for k in (1, 5, 10)]
    tuning, report = paths.part(split["training"]), paths.part(split["report"])
    rule = MarginRule.load(margins)
    assert rule.margin == max(row["needed"] for row in rows) < 1e9
    assert rule.noise == pytest.approx(score_noise(tuning.scores))
    for row in rows:
        scores = [own[:, : row["candidates"]] for own in tuning.scores]
        needed = MarginRule(rule.noise, row["needed"])
        assert np.mean([precision(own, needed, row["top_k"]) for own in scores]) >= 0.9
        layers = [replay(own[:, : row["candidates"]], rule, row["top_k"]).layers for own in report.scores]
        assert row["report"]["executions"] == pytest.approx(np.mean(layers) / 6)
    assert "\n| 24 | 10 | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(file), str(record), str(margins)])


def test_layers_that_say_nothing_are_kept_as_such(tmp_path):
    path = np.stack([np.arange(12.0), -np.arange(12.0), -np.arange(12.0)])
    names = tuple(map(str, range(6)))
    paths = ScorePaths(names, (path,) * 6, (np.ones(12, int),) * 6, (np.full(12, np.nan),) * 6, {})
    file = paths.save(tmp_path / "paths.npz")
    main([str(file), str(tmp_path / "record.json"), str(tmp_path / "margins.json"), "--sizes", "12"])
    assert MarginRule.load(tmp_path / "margins.json").noise == (np.inf, 0.0, 0.0)
