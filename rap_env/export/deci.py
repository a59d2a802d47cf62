"""DeciLM checkpoints: Llama's weights, and for each layer whether it has an attention and how wide its MLP is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import AutoConfig

from rap_env.errors import ExportRefused
from rap_env.export import configuration_decilm, modeling_rap_pruned
from rap_env.export.compare import check_model
from rap_env.export.hf import BIAS_FLAGS, in_type, model_with
from rap_env.export.pruned import KeptLayer, PrunedModel

_NAME = "a DeciLM checkpoint"
_MULTIPLE = 256  # readers round the width of an MLP up to a multiple of this
_WEIGHTS = "model.safetensors"


def write(pruned: PrunedModel, folder: Path) -> None:
    """Writes config, weights and tokenizer."""
    flags = {flag: bool(pruned.biased & set(paths)) for flag, paths in BIAS_FLAGS.items()}
    for flag, paths in BIAS_FLAGS.items():
        if flags[flag]:
            pruned = pruned.with_biases(paths)  # one entry stands for all of these matrices: zeros for the others
    pruned = replace(pruned, layers=tuple(_padded(layer) for layer in pruned.layers))
    values = _config(pruned) | flags
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    source = Path(configuration_decilm.__file__)
    (folder / source.name).write_bytes(source.read_bytes())
    save_file(
        {name: tensor.contiguous() for name, tensor in pruned.state().items()}, folder / _WEIGHTS, {"format": "pt"}
    )
    pruned.generation_config.save_pretrained(folder)
    pruned.tokenizer.save_pretrained(folder)


def refuse(pruned: PrunedModel) -> None:
    """Refuses what the format can't hold, before anything is written.

    Raises:
        ExportRefused: Says what it is.
    """
    pruned.refuse_unlike_llama(_NAME)
    config, why = pruned.config, None
    heads = {layer.query_heads for layer in pruned.layers} - {0}
    if pruned.head_size * config.num_attention_heads != config.hidden_size:
        why = "its heads are not hidden_size / num_attention_heads wide, which some readers take for granted"
    elif heads - {config.num_attention_heads}:
        why = (
            f"the mask keeps {min(heads)} of {config.num_attention_heads} query heads of an attention; DeciLM has one"
            " number of query heads for all layers: drop whole attentions and groups of MLP channels only"
        )
    elif not pruned.layers[0].query_heads:
        why = "the first layer of which anything is kept has no attention; vLLM can't run such a model"
    if why:
        raise ExportRefused(f"{_NAME} can't hold this model: {why}; export it as hf or gguf")


def _padded(layer: KeptLayer) -> KeptLayer:
    """The layer with channels of zeros in its MLP, up to the next multiple of 256."""
    if not (more := -layer.mlp_channels % _MULTIPLE):
        return layer
    weights = dict(layer.weights)
    for name in ("gate_proj", "up_proj"):
        weights[f"mlp.{name}.weight"] = pad(weights[f"mlp.{name}.weight"], (0, 0, 0, more))
        if (bias := weights.get(f"mlp.{name}.bias")) is not None:
            weights[f"mlp.{name}.bias"] = pad(bias, (0, more))
    weights["mlp.down_proj.weight"] = pad(weights["mlp.down_proj.weight"], (0, more))
    return replace(layer, mlp_channels=layer.mlp_channels + more, weights=weights)


def _config(pruned: PrunedModel) -> dict[str, Any]:
    """Entries as Llama's config had them before transformers 5: readers of all ages know these."""
    config, rope = pruned.config, dict(pruned.config.rope_parameters)
    kept = ("hidden_size", "hidden_act", "num_attention_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size")
    kept += ("initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    theta = rope.pop("rope_theta")
    return {key: getattr(config, key) for key in kept} | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "num_hidden_layers": len(pruned.layers),
        "num_key_value_heads": max(layer.kv_heads for layer in pruned.layers),
        "intermediate_size": max(layer.mlp_channels for layer in pruned.layers) or config.intermediate_size,
        "head_dim": pruned.head_size,
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "torch_dtype": str(pruned.dtype).removeprefix("torch."),
        "block_configs": [_block(layer, config.hidden_size) for layer in pruned.layers],
    }


def _block(layer: KeptLayer, hidden_size: int) -> dict[str, Any]:
    group = layer.query_heads // layer.kv_heads if layer.kv_heads else None
    multiple = 3 * layer.mlp_channels / (2 * hidden_size) if layer.mlp_channels else None
    rest = {"replace_with_linear": False, "sparsify": None}
    return {
        "attention": {"no_op": group is None, "n_heads_in_group": group} | rest,
        "ffn": {"no_op": multiple is None, "ffn_mult": multiple} | rest,
    }


def check(pruned: PrunedModel, folder: Path) -> str:
    """Builds a model from what was written by the rules of DeciLM's readers, and compares it.

    transformers has no DeciLM. The rules are vLLM's: widths follow from `ffn_mult`, KV heads from `n_heads_in_group`.

    Raises:
        ExportRefused: Weights are missing or of other sizes, or it computes something else.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    heads = config.num_attention_heads
    blocks = [(block.attention, block.ffn) for block in config.block_configs]
    values = json.loads((folder / "config.json").read_text()) | {
        "layer_query_heads": [0 if attention.no_op else heads for attention, _ in blocks],
        "layer_kv_heads": [0 if attention.no_op else heads // attention.n_heads_in_group for attention, _ in blocks],
        "layer_mlp_channels": [0 if ffn.no_op else _width(ffn.ffn_mult, config.hidden_size) for _, ffn in blocks],
        "biased_linears": [path for flag, paths in BIAS_FLAGS.items() if getattr(config, flag) for path in paths],
    }
    for key in ("model_type", "auto_map", "torch_dtype"):
        del values[key]
    values["architectures"] = [modeling_rap_pruned.RapPrunedLlamaForCausalLM.__name__]
    try:
        model = model_with(modeling_rap_pruned.RapPrunedLlamaConfig(**values), load_file(folder / _WEIGHTS))
    except RuntimeError as error:
        raise ExportRefused(f"the DeciLM checkpoint does not hold what its config says: {error}") from error
    check_model(in_type(model, pruned.dtype).to(pruned.device), pruned, "the rules of DeciLM's readers")
    return "the rules of DeciLM's readers: transformers has none"


def _width(ffn_mult: float, hidden_size: int) -> int:
    width = int(2 * ffn_mult * hidden_size / 3)
    return width + -width % _MULTIPLE
