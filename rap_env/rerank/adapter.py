"""LoRA adapters of peft, merged into a model when it is loaded."""

import importlib.util
import warnings
from pathlib import Path

import torch

from rap_env.errors import ModelUnavailable
from rap_env.llm.switchable import SwitchableLLM

EMBEDDED_ADAPTER = Path(__file__).parent / "adapters" / "smollm2-135m"  # made by scripts/train_reranker.py
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def merge_adapter(llm: SwitchableLLM, folder: str | Path) -> None:
    """Adds an adapter's matrices to those of a model, in float32: small changes vanish in bfloat16.

    Args:
        llm: In floating point.
        folder: With the adapter, as peft saves it, in safetensors.

    Raises:
        ModelUnavailable: `peft` is not installed, or the folder holds no adapter for this model. What the adapter has
            changed so far stays: load the model anew.
    """
    folder, dtype = Path(folder).expanduser(), llm.dtype
    if importlib.util.find_spec("peft") is None:
        raise ModelUnavailable("an adapter needs the package peft: pip install 'rap-env[export]'")
    if missing := [name for name in _FILES if not (folder / name).is_file()]:
        raise ModelUnavailable(f"expected an adapter of peft in {folder}; it has no {' and no '.join(missing)}")
    import peft

    _turn(llm, torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it asks transformers for what that calls by another name
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            peft.PeftModel.from_pretrained(llm.model, folder, local_files_only=True).merge_and_unload()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelUnavailable(f"the adapter in {folder} can't be merged: {reason[:200]}") from error
    _turn(llm, dtype)
    llm.model.eval().requires_grad_(False)
    llm.weights_changed()


def _turn(llm: SwitchableLLM, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies stay in float32 whatever a model's type."""
    for parameter in llm.model.parameters():
        parameter.data = parameter.data.to(dtype)
