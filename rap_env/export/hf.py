"""Checkpoints that transformers loads: ordinary ones where the layers stay alike, else with a model file beside."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rap_env.errors import RapError
from rap_env.export import modeling_rap_pruned
from rap_env.export.compare import check_model
from rap_env.export.pruned import PrunedModel
from rap_env.llm.shape import skeleton
from rap_env.rng import isolated_rng

_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
# Entries of a config that give matrices a bias, all of these at once.
BIAS_FLAGS = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
_CODE = Path(modeling_rap_pruned.__file__)
_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "opt": "OPT"}


def write(pruned: PrunedModel, folder: Path) -> None:
    """Writes config, weights and tokenizer; the model file beside them only where it is needed."""
    if (ordinary := _ordinary(pruned)) is not None:
        config, pruned = ordinary
    else:
        config = own_config(pruned)
        (folder / _CODE.name).write_bytes(_CODE.read_bytes())
        pruned = pruned.with_biases(config.biased_linears)
    write_checkpoint(pruned, config, pruned.state(), folder)


def check(pruned: PrunedModel, folder: Path) -> str:
    """Loads the checkpoint as its users will, and compares it; raises what `check_model` raises."""
    model = load(folder, pruned.dtype)
    check_model(model.to(pruned.device), pruned, "transformers")
    return "transformers, with trust_remote_code=True" if _has_own_code(folder) else "transformers"


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Loads a checkpoint that `write` wrote."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=_has_own_code(folder)).eval()


def _has_own_code(folder: Path) -> bool:
    return (folder / _CODE.name).is_file()


def write_checkpoint(
    pruned: PrunedModel, config: PretrainedConfig, state: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Writes a checkpoint with this config and these weights; everything else is the unpruned model's."""
    generation = copy.deepcopy(pruned.generation_config)
    if not any(layer.query_heads for layer in pruned.layers):  # no cache, hence no past length to continue from
        config.use_cache = generation.use_cache = False
    config.dtype = pruned.dtype
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    pruned.tokenizer.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _ordinary(pruned: PrunedModel) -> tuple[PretrainedConfig, PrunedModel] | None:
    """The family's own config for the smaller model, where it has one, with the weights that it asks for.

    It has one exactly if the model that the config describes has these weights: so nothing is assumed here about which
    sizes a family's config can say.
    """
    if len({layer.widths for layer in pruned.layers}) > 1 or not all(pruned.layers[0].widths):
        return None
    values, pruned = _with_flags(pruned, _values(pruned))
    query_heads, kv_heads, mlp_channels = pruned.layers[0].widths
    values |= {"num_attention_heads": query_heads}
    if pruned.config.model_type == "opt":
        values |= {"ffn_dim": mlp_channels}
    else:
        values |= {"num_key_value_heads": kv_heads, "head_dim": pruned.head_size, "intermediate_size": mlp_channels}
    try:
        config = type(pruned.config).from_dict(values)
        described = skeleton(config, pruned.dtype)
    except (RapError, StrictDataclassError, ValueError):
        return None
    config.architectures = [type(described).__name__]
    return (config, pruned) if _sizes(described) == _sizes(pruned) else None


def _with_flags(pruned: PrunedModel, values: dict[str, Any]) -> tuple[dict[str, Any], PrunedModel]:
    """Sets the entries for biases that the weights have, and adds zeros where an entry asks for more of them."""
    for flag, paths in BIAS_FLAGS.items():
        if flag in values and pruned.biased & set(paths):
            values, pruned = values | {flag: True}, pruned.with_biases(paths)
    return values, pruned


def _values(pruned: PrunedModel) -> dict[str, Any]:
    """The unpruned model's config, for fewer layers."""
    values, n_layers = pruned.config.to_dict(), len(pruned.layers)
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:n_layers]  # they are alike
    return values | {"num_hidden_layers": n_layers}


def _sizes(model: PrunedModel | nn.Module) -> dict[str, torch.Size]:
    state = model.state() if isinstance(model, PrunedModel) else model.state_dict()
    sizes = {name: tensor.shape for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        sizes.pop("lm_head.weight", None)
    return sizes


def own_config(pruned: PrunedModel) -> PretrainedConfig:
    """The config of the class in `modeling_rap_pruned.py` that runs these layers."""
    name = f"RapPruned{_NAMES[pruned.config.model_type]}"
    heads, kv_heads, channels = zip(*(layer.widths for layer in pruned.layers), strict=True)
    values = _values(pruned) | {
        "layer_query_heads": list(heads),
        "layer_kv_heads": list(kv_heads),
        "layer_mlp_channels": list(channels),
        "biased_linears": sorted(pruned.biased),
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"modeling_rap_pruned.{name}Config",
            "AutoModelForCausalLM": f"modeling_rap_pruned.{name}ForCausalLM",
        },
    }
    if pruned.config.model_type != "opt":
        values["head_dim"] = pruned.head_size
    del values["model_type"]
    return getattr(modeling_rap_pruned, f"{name}Config")(**values)


def own_model(pruned: PrunedModel) -> nn.Module:
    """The model as the class in `modeling_rap_pruned.py` builds it, in the weights' own type.

    Raises:
        ExportRefused: It does not compute what the masked model does.
    """
    config = own_config(pruned)
    pruned = pruned.with_biases(config.biased_linears)
    model = in_type(model_with(config, pruned.state()), pruned.dtype).to(pruned.device)
    check_model(model, pruned, "the class of its own")
    return model


def model_with(config: PretrainedConfig, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A float32 model of a class in `modeling_rap_pruned.py`; `RuntimeError` where it needs other weights."""
    with isolated_rng(0):  # its weights are random at first
        model = getattr(modeling_rap_pruned, config.architectures[0])(config)
    if config.tie_word_embeddings:
        state = dict(state) | {"lm_head.weight": model.lm_head.weight}
    model.load_state_dict(state)
    return model.eval()


def in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its weights in another type; rotary frequencies stay in float32, as transformers keeps them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
