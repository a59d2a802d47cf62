"""The command chooses formats of sites, writes them once, and prints what a run takes."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.recipes.build import build_llm
from rap_env.llm.loading import load_llm
from scripts.bits import main

CONF = Path(__file__).parents[2] / "conf"
TINY = ["model=tiny", "dtype=float32", "formats=full", "windows=2", "window_tokens=32"]  # INT4 does not divide it


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("What is said here is said for the sake of some tokens. " * 4)
    return f"text={path}"


def test_what_the_command_prints_gives_the_model_that_it_chose(text, tmp_path, capsys):
    budget = load_llm("tiny", "float32", weights="int8").shape.weight_bytes + 40_000  # for one or two sites in full
    main([*TINY, text, f"budget_bytes={budget}", f"out={tmp_path / 'bits.json'}"])
    printed = capsys.readouterr().out.splitlines()
    chosen = json.loads((tmp_path / "bits.json").read_text())
    llm = load_llm("tiny", "float32", weights=chosen["weights"])
    assert llm.shape.weight_bytes == chosen["weight_bytes"] <= budget and chosen["weights"]
    assert len(printed) == 16 + 3 and sum(line.startswith("*") for line in printed) == 8
    assert f"{chosen['weight_bytes']:,} bytes, {len(chosen['weights'])} of 8 sites not in int8" in printed[-2]
    increases = [float(line.rpartition(" ")[2]) for line in printed[:16]]
    assert increases == sorted(increases)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["experiment=smoke", printed[-1].strip("'")])
        assert build_llm(config)[0].digest == llm.digest
        parts = compose("config", ["experiment=smoke", "model.granularity=group", "model.weights={layer3.mlp:full}"])
        types = [
            [p.dtype for p in matrices] for matrices in map(build_llm(parts)[0].parameters_of, llm.shape.sites[-2:])
        ]
        assert [torch.int8 in each for each in types] == [True, False]


def test_bad_input_is_refused_in_one_line(text, tmp_path):
    out = tmp_path / "bits.json"

    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*TINY, f"out={out}", *options])
        return str(stopped.value)

    least = load_llm("tiny", "float32", weights="int8").shape.weight_bytes
    assert f"expected a budget of at least {least:,} bytes" in refused(text, "budget_bytes=5")
    assert "unknown format of weights 'int3'" in refused(text, "budget_bytes=1_000_000", "formats=int3")
    assert "layer0.self_attn.q_proj has 32 inputs" in refused(text, "budget_bytes=1_000_000", "formats=int4")
    assert refused("text=gone.txt", "budget_bytes=1_000_000").startswith("error: ")
    assert not out.exists()
    out.write_text("kept")
    assert f"expected a new file; {out} exists" in refused(text, "budget_bytes=1_000_000")
    assert out.read_text() == "kept"
