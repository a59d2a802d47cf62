"""GGUF files for llama.cpp: its architecture `llama` where layers stay alike, else `deci`, where they may differ."""

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from rap_env.errors import ExportRefused
from rap_env.export import llama_cpp
from rap_env.export.compare import check_logits
from rap_env.export.hf import in_type, own_model
from rap_env.export.pruned import KeptLayer, PrunedModel
from rap_env.export.vocabulary import vocabulary_of

FILE_NAME = "model.gguf"
_NAME = "llama.cpp's architecture 'deci'"
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_FIXED = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TEXT = "It's 12,345 Na\u00efve\n\n  \u20ac1 \u6f22\u5b57,\tTHEY'RE  ok"  # letters, digits, spaces, signs
_ZERO_CHANNELS = 32  # of an MLP that adds nothing: one block of llama.cpp's quantised types


def write(pruned: PrunedModel, folder: Path) -> None:
    """Writes one file with the weights in their own type and the tokenizer."""
    layers = readable(pruned)
    alike = len({layer.widths for layer in layers}) == 1
    kind, file_type = _TYPES[pruned.dtype]
    writer = gguf.GGUFWriter(folder / FILE_NAME, "llama" if alike else "deci")
    writer.add_file_type(file_type)
    _add_sizes(writer, pruned, layers, alike)
    vocabulary_of(pruned.tokenizer, pruned.config.vocab_size).add_to(writer)
    for name, tensor in tensors(pruned, layers):
        values = tensor.detach().cpu().float().numpy()
        kind_here = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32  # llama.cpp adds and scales in float32
        writer.add_tensor(name, gguf.quantize(values, kind_here), raw_dtype=kind_here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(pruned: PrunedModel, folder: Path) -> str:
    """Reads every tensor again, and lets llama.cpp compute with them where the package `xllamacpp` is installed.

    Raises:
        ExportRefused: A tensor is not what was to be written, or llama.cpp computes something else.
    """
    path = folder / FILE_NAME
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors(pruned, readable(pruned)):
        written = read.pop(name, None)
        values = None if written is None else gguf.dequantize(written.data, written.tensor_type)
        if values is None or not np.array_equal(values, tensor.detach().cpu().float().numpy()):
            raise ExportRefused(f"{path.name} does not hold {name!r} as it was to be written; nothing was written")
    if not llama_cpp.is_installed():
        return f"the gguf package, tensor by tensor; {llama_cpp.LIBRARY}, which runs llama.cpp, is not installed"
    _check_computed(pruned, path)
    return "llama.cpp"


def _check_computed(pruned: PrunedModel, path: Path) -> None:
    """Compares llama.cpp with the model in float32: llama.cpp rounds to the weights' type in other places than PyTorch.

    In bfloat16 the two differ by more than the mistakes that are to be found here.
    """
    vocabulary = vocabulary_of(pruned.tokenizer, pruned.config.vocab_size)
    reader = llama_cpp.Reader(path, vocabulary, pruned.config.vocab_size)
    with torch.inference_mode():
        model = in_type(own_model(pruned), torch.float32)
        logits = model(pruned.tokens.to(pruned.device), use_cache=False).logits[0].cpu()
    row = pruned.tokens[0].tolist()
    for length in (1, 12, 20, 21, 22, len(row)):  # each continues the one before from the KV cache
        known = reader.next_token(row[:length])
        expected = logits[length - 1].log_softmax(-1)[list(known)]
        check_logits(torch.tensor(list(known.values())), expected, pruned.dtype, "llama.cpp")
    ids = pruned.tokenizer(_TEXT).input_ids
    if reader.next_token(_TEXT, from_cache=False) != reader.next_token(ids, from_cache=False):
        raise ExportRefused("llama.cpp splits text into other tokens than the model's tokenizer; nothing was written")


def refuse(pruned: PrunedModel) -> None:
    """Refuses what the format can't hold, before anything is written.

    Raises:
        ExportRefused: Says what it is.
    """
    pruned.refuse_unlike_llama(_NAME)
    rope_type = pruned.config.rope_parameters.get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3"):
        raise ExportRefused(
            f"{_NAME} can't hold this model: its positions are of rope_type {rope_type!r}; export it as hf"
        )
    vocabulary_of(pruned.tokenizer, pruned.config.vocab_size)


def readable(pruned: PrunedModel) -> list[KeptLayer]:
    """The layers with what llama.cpp can't do without: zeros that change nothing.

    Where a layer of `deci` has no MLP, llama.cpp skips its attention too; and it takes the size of a head from layer 0.
    """
    return [
        _with_attention(pruned, _with_mlp(pruned, layer)) if index == 0 else _with_mlp(pruned, layer)
        for index, layer in enumerate(pruned.layers)
    ]


def _with_mlp(pruned: PrunedModel, layer: KeptLayer) -> KeptLayer:
    if layer.mlp_channels:
        return layer
    hidden, fixed = pruned.config.hidden_size, next(iter(pruned.fixed.values()))
    zeros = {f"mlp.{name}.weight": fixed.new_zeros(_ZERO_CHANNELS, hidden) for name in ("gate_proj", "up_proj")}
    zeros |= {"mlp.down_proj.weight": fixed.new_zeros(hidden, _ZERO_CHANNELS)}
    zeros |= {"post_attention_layernorm.weight": fixed.new_ones(hidden)}
    return KeptLayer(layer.query_heads, layer.kv_heads, _ZERO_CHANNELS, dict(layer.weights) | zeros)


def _with_attention(pruned: PrunedModel, layer: KeptLayer) -> KeptLayer:
    if layer.query_heads:
        return layer
    hidden, head, fixed = pruned.config.hidden_size, pruned.head_size, next(iter(pruned.fixed.values()))
    zeros = {f"self_attn.{name}_proj.weight": fixed.new_zeros(head, hidden) for name in "qkv"}
    zeros |= {"self_attn.o_proj.weight": fixed.new_zeros(hidden, head)}
    zeros |= {"input_layernorm.weight": fixed.new_ones(hidden)}
    return KeptLayer(1, 1, layer.mlp_channels, dict(layer.weights) | zeros)


def tensors(pruned: PrunedModel, layers: list[KeptLayer]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their names in the file; heads' channels in the order in which llama.cpp rotates them."""
    for name, tensor in pruned.fixed.items():
        path, _, end = name.rpartition(".")
        yield f"{_FIXED[path]}.{end}", tensor
    if (factors := _rope_factors(pruned)) is not None:
        yield "rope_freqs.weight", factors
    for index, layer in enumerate(layers):
        for name, tensor in layer.weights.items():
            path, _, end = name.rpartition(".")
            heads = {"self_attn.q_proj": layer.query_heads, "self_attn.k_proj": layer.kv_heads}.get(path)
            yield f"blk.{index}.{_IN_LAYER[path]}.{end}", tensor if heads is None else _interleaved(tensor, heads)


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of heads from halves that rotate together, as transformers has them, to pairs."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_sizes(writer: gguf.GGUFWriter, pruned: PrunedModel, layers: list[KeptLayer], alike: bool) -> None:
    config, rope = pruned.config, pruned.config.rope_parameters
    heads, kv_heads, channels = map(list, zip(*(layer.widths for layer in layers), strict=True))
    writer.add_head_count(heads[0] if alike else heads)
    writer.add_head_count_kv(kv_heads[0] if alike else kv_heads)
    writer.add_feed_forward_length(channels[0] if alike else channels)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(pruned.head_size)
    writer.add_value_length(pruned.head_size)
    writer.add_rope_dimension_count(pruned.head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(pruned: PrunedModel) -> torch.Tensor | None:
    """By what Llama 3 divides each frequency: 1 for short waves, the factor for long ones, in between a mix."""
    rope = pruned.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    frequencies = rope["rope_theta"] ** -(torch.arange(0, pruned.head_size, 2).double() / pruned.head_size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - mix) / rope["factor"] + mix)).float()
