"""`python -m rap_env.lm_eval`: lm-eval's command line, which knows our model `rap`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rap_env import lm_eval as command
from rap_env.evaluation.lm import RapLM
from rap_env.mask import PruningMask
from tests.evaluation.lm_eval_cases import by_lm_eval, hf, write_task

PROJECT = Path(__file__).parents[2]
WORDS = ("red", "a lot", "seven", "Rome", "never", "x")
ROWS = [
    {"question": f"{n} of {WORDS[n % 6]} is", "choices": WORDS[n % 4 : n % 4 + 3], "gold": n % 3} for n in range(24)
]


def start(folder: Path, name: str, model_args: str) -> subprocess.Popen:
    options = {"model": "rap", "model_args": model_args, "include_path": folder, "tasks": "toy"}
    options |= {"output_path": folder / name / "results.json"}
    arguments = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "rap_env.lm_eval", *arguments],
        cwd=PROJECT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, folder: Path, name: str) -> dict:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    (path,) = (folder / name).rglob("results*.json")
    metrics = json.loads(path.read_text())["results"]["toy"]
    return {metric: metrics[f"{metric},none"] for metric in ("acc", "acc_norm")}


@pytest.mark.slow
def test_the_command_gives_what_lm_eval_gives_of_the_saved_and_of_the_masked_model(tiny_llm, tmp_path):
    tiny_llm.model.save_pretrained(tmp_path / "model")
    tiny_llm.tokenizer.save_pretrained(tmp_path / "model")
    write_task(tmp_path, "toy", ROWS)
    mask = PruningMask.all_kept(tiny_llm.shape).drop("layer0.attention", "layer0.mlp", "layer3.mlp")
    (tmp_path / "mask.json").write_text(mask.to_json())
    saved = f"pretrained={tmp_path}/model,dtype=float32"
    dense, _ = by_lm_eval("hf", ["toy"], tmp_path, model_args=saved, device="cpu")
    with tiny_llm.pruned(mask):
        masked, _ = by_lm_eval(hf(tiny_llm), ["toy"], tmp_path)
    assert dense != masked
    with start(tmp_path, "a", saved) as plain, start(tmp_path, "b", f"{saved},mask={tmp_path}/mask.json") as pruned:
        assert finish(plain, tmp_path, "a") == dense["toy"]
        assert finish(pruned, tmp_path, "b") == masked["toy"]


def test_the_packages_own_errors_end_the_command_with_one_line(monkeypatch):
    monkeypatch.setattr(command, "cli_evaluate", lambda: RapLM("tiny", maks="mask.json"))
    with pytest.raises(SystemExit, match=r"\Aunknown model argument 'maks'; did you mean mask\?\Z"):
        command.main()
