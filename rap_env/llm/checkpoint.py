"""What is checked about a model's files and the weights read from them: upstream would log it and go on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rap_env.errors import ModelUnavailable

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weights_in(folder: Path) -> dict[str, str]:
    """The options with which transformers finds the weights of a local folder.

    Raises:
        ModelUnavailable: There are none in a safe format, some are missing, or they are an adapter's only.
    """
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:  # read or passed over, depending on whether another library is installed
        raise ModelUnavailable(
            f"{folder}: expected a whole model; found an adapter (adapter_config.json): merge it into its base model"
        )
    if _WEIGHTS in names:
        return {}
    if _INDEX in names:
        _check_shards(folder)
        return {}
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) != 1:
        raise ModelUnavailable(
            f"{folder}: expected {_WEIGHTS}, {_INDEX} with its shards, or exactly one *.gguf; found"
            f" {', '.join(names[:8]) or 'nothing'}."
            " Pickled weights (*.bin, *.pt) are not loaded: convert them to safetensors first"
        )
    return {"gguf_file": ggufs[0]}


def _check_shards(folder: Path) -> None:
    try:
        shards = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelUnavailable(f"{folder}: {_INDEX} does not say which shard holds which weight") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelUnavailable(
            f"{folder}: {len(missing)} of the {len(shards)} shards in {_INDEX} are missing, first {missing[0]!r}"
        )


def check_weights(source: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Refuses a model that is not exactly what its files hold.

    Args:
        source: Where the model comes from.
        model: The model as it was loaded.
        report: The loading info of `from_pretrained`, with mismatched sizes ignored by it.

    Raises:
        ModelUnavailable: Files and config disagree on the weights or on the family.
    """
    named, family = model.config.architectures or [], type(model).__name__.removesuffix("ForCausalLM")
    if sizes := sorted(report["mismatched_keys"]):
        name, in_files, by_config = sizes[0]
        problem = (
            f"{len(sizes)} weights in its files have other sizes than by its config, first"
            f" {name!r} with {list(in_files)} for {list(by_config)}; all layers have to be alike"
        )
    elif missing := sorted(report["missing_keys"]):
        problem = f"its files lack {len(missing)} weights, first {missing[0]!r}"
    elif more := sorted(report["unexpected_keys"]):
        problem = f"its files hold {len(more)} weights that its config has no place for, first {more[0]!r}"
    elif named and not any(name.lower().startswith(family.lower()) for name in named):
        problem = f"its config names the architecture {named[0]}, but the model_type of {family}"
    else:
        return
    raise ModelUnavailable(f"can't load {source!r}: {problem}")


def forget_quantisation(model: nn.Module) -> None:
    """Makes a model that was read from a GGUF the plain one that it is now: all its weights are dequantised."""
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
