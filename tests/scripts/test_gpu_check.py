"""The GPU check runs whole on a CPU with a tiny model, and what it says there is exact."""

import subprocess
import sys

import pytest

from experiments.records import read_record
from rap_env.llm.architecture import ARCHITECTURES
from scripts.gpu_check import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("gpu") / "check.json"
    main([str(path), "--tiny"])
    return read_record(path)["results"]


def test_every_family_is_exact(results):
    assert set(results["exactness"]) == {f"{family}, {of}s" for family in ARCHITECTURES for of in ("block", "group")}
    for entry in results["exactness"].values():
        assert entry["together_equal_alone"] and entry["dense_again_equal"]
        assert entry["largest_logit_difference"] < 1e-4 and entry["largest_log_likelihood_difference"] < 1e-3


def test_masks_need_less_memory_the_more_they_drop_and_their_caches_are_as_predicted(results):
    dense, larger, smaller = (results["memory"][name] for name in ("dense", "80%", "60%"))
    assert dense["kv_cache_equal"] and larger["kv_cache_equal"] and smaller["kv_cache_equal"]
    assert dense["predicted_peak_gb"] > larger["predicted_peak_gb"] > smaller["predicted_peak_gb"]
    # 4 layers of 36,864 bytes, 2 x 257 x 32 of embedding and head, 9 norms of 32; 2 x 64 cached tokens of 512 bytes.
    assert dense["predicted_peak_gb"] == (4 * (36_864 + 512 * 128 // 4) + 4 * (2 * 257 * 32 + 9 * 32)) / 1e9
    assert dense["measured_gb"] is None and dense["published_gb"] == 23.70


def test_plain_transformers_and_ours_measure_the_same(results):
    for name in ("forward", "importance round", "population of 32", "scoring"):
        assert results["speed"][name]["largest_difference"] < 1e-3, name
        assert results["speed"][name]["speedup"]["ratio"] > 0


def test_a_record_is_written_once_and_a_missing_gpu_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "there.json").touch()
    with pytest.raises(SystemExit, match="error: no GPU is available to torch; --tiny tries the script out"):
        main([str(tmp_path / "new.json")])
    with pytest.raises(SystemExit, match="exists, and records are written once"):
        main([str(tmp_path / "there.json"), "--tiny"])


def test_it_needs_only_torch_transformers_safetensors_gymnasium_and_psutil():
    blocked = (
        "lm_eval",
        "sqlalchemy",
        "scipy",
        "sklearn",
        "stable_baselines3",
        "hydra",
        "omegaconf",
        "datasets",
    )
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import scripts.gpu_check; print('imported')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("imported\n"), done.stderr
