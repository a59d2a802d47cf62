"""What a stored result depends on beside mask and evaluator."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rap_env.evaluation import identity
from rap_env.evaluation.identity import ENGINE_VERSION, engine_identity, numeric_platform
from rap_env.llm import widened

X86 = """processor\t: 0
vendor_id\t: {maker}
flags\t\t: fpu smep sse2 sse4_2 fma avx avx2 {more}

processor\t: 1
flags\t\t: never read
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd aes fphp asimdhp sve bf16 i8mm
CPU implementer\t: 0x41
"""


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Stands for /proc/cpuinfo; nothing is remembered from one text to the next."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(identity, "Path", lambda _: file)
    identity._platform.cache_clear()
    yield file
    identity._platform.cache_clear()


def test_a_cpu_is_known_by_its_maker_and_what_changes_kernels(cpuinfo):
    cpuinfo.write_text(X86.format(maker="GenuineIntel", more="avx512f amx_tile"))
    found = numeric_platform("cpu")
    assert found["device"] == "cpu"
    assert found["maker"] == "GenuineIntel"
    assert found["features"] == ["amx_tile", "avx", "avx2", "avx512f", "fma", "sse4_2"]


def test_arm_processors_are_described_too(cpuinfo):
    cpuinfo.write_text(ARM)
    found = numeric_platform("cpu")
    assert found["maker"] == "0x41"
    assert found["features"] == ["asimd", "asimdhp", "bf16", "fphp", "i8mm", "sve"]


@pytest.mark.parametrize(
    "other", [X86.format(maker="GenuineIntel", more="avx512f"), X86.format(maker="AuthenticAMD", more="")]
)
def test_processors_with_other_kernels_differ(cpuinfo, other):
    cpuinfo.write_text(X86.format(maker="GenuineIntel", more=""))
    first = numeric_platform("cpu")
    identity._platform.cache_clear()
    cpuinfo.write_text(other)
    assert numeric_platform("cpu") != first


def test_systems_without_cpuinfo_name_the_processor(cpuinfo, monkeypatch):
    monkeypatch.setattr(identity.platform, "processor", lambda: "Intel64 Family 6 Model 143, GenuineIntel")
    assert numeric_platform("cpu")["processor"] == "Intel64 Family 6 Model 143, GenuineIntel"


def test_another_build_of_pytorch_is_another_platform(cpuinfo, monkeypatch):
    cpuinfo.write_text(ARM)
    builds = []
    for blas in ("OpenBLAS", "Arm Performance Libraries"):
        monkeypatch.setattr(torch.__config__, "show", lambda blas=blas: f"PyTorch built with:\n  - {blas}")
        identity._platform.cache_clear()
        builds.append(numeric_platform("cpu"))
    assert builds[0] != builds[1]


def test_a_gpu_is_known_by_its_name_and_libraries(cpuinfo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    assert numeric_platform(torch.device("cuda:1")) == {
        "device": "cuda",
        "name": "GPU of cuda:1",
        "capability": [9, 0],
        "runtime": "12.6",
        "cudnn": 90100,
    }


def test_a_second_process_has_the_same_platform_in_json_values():
    code = "import json; from rap_env.evaluation.identity import numeric_platform as n; print(json.dumps(n('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == numeric_platform("cpu") == numeric_platform(torch.device("cpu"))


def test_a_cpu_with_another_number_of_threads_is_another_platform(monkeypatch):
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(numeric_platform("cpu"))
    assert found[0] | {"threads": 2} == found[1] != found[0]


@pytest.mark.slow
@pytest.mark.llm
def test_threads_are_lanes_which_round_differently_in_bfloat16(embedded_folder):
    code = (
        "import sys, torch, rap_env; from rap_env.evaluation.perplexity import PerplexityEvaluator as P;"
        " torch.set_num_threads(int(sys.argv[1])); llm = rap_env.load_llm(device='cpu');"
        " print(P(torch.arange(2 * 256).view(2, 256), 'numbers').evaluate(llm).score)"
    )
    runs = [[sys.executable, "-c", code, threads] for threads in "112"]
    scores = [float(subprocess.run(run, check=True, capture_output=True, text=True).stdout) for run in runs]
    assert scores[0] == scores[1] == pytest.approx(scores[2], abs=0.01)


def test_changing_an_answer_changes_no_later_one():
    numeric_platform("cpu")["device"] = "changed"
    assert numeric_platform("cpu")["device"] == "cpu"


@pytest.mark.parametrize("multiplies", [True, False])
def test_an_engine_identity_holds_engine_platform_model_tokenizer_dtype_and_versions(multiplies, monkeypatch):
    monkeypatch.setattr(widened, "multiplies_bfloat16", lambda: multiplies)
    llm = SimpleNamespace(digest="5f", tokenizer_digest="7a", dtype=torch.bfloat16, device=torch.device("cpu"))
    found = engine_identity(llm)
    assert found == {
        "engine": ENGINE_VERSION,
        "platform": numeric_platform("cpu"),
        "model": "5f",
        "tokenizer": "7a",
        "dtype": "torch.bfloat16",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    } | ({} if multiplies else {"linear layers": "float32"})
    assert json.loads(json.dumps(found)) == found


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="Linux")
def test_this_machines_features_are_found():
    assert numeric_platform("cpu")["features"]
