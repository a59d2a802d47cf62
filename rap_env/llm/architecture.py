"""What the package knows of model families: one table, and how a layer of each is run site by site."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from rap_env.components import ATTENTION
from rap_env.errors import UnknownName
from rap_env.llm.attention import attention as attend
from rap_env.llm.int8_cache import only_hooked_by_int8
from rap_env.llm.kernels import added, gated, hooked, product, rms_norm, rotated
from rap_env.llm.packing import PACKED_ATTENTION, PackedStream
from rap_env.llm.parts import Cut, cut_attention, cut_mlp, narrowed, replace_linear, twin, with_modules, with_tensors
from rap_env.llm.placement import moved
from rap_env.llm.supported import Window, check_member
from rap_env.llm.widened import linears_widened


@dataclass(frozen=True)
class Architecture:
    """Where a pre-norm decoder family keeps its parts; each string is an attribute path."""

    decoder: str  # from the causal LM to the module that holds the layers
    attention_norm: str  # from a layer to the norm in front of the attention
    mlp_norm: str  # from a layer to the norm in front of the MLP
    mlp_modules: tuple[str, ...]  # from a layer to the modules that hold the MLP's weights
    final_norm: str  # from the decoder to the norm after the last layer
    norm: Callable[[nn.Module, torch.Tensor], torch.Tensor]  # of a layer's norm, on states [batch, tokens, hidden]
    # Of a layer or its attention, on normed states and the residual stream that the result is added to.
    mlp: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    attention: Callable[[nn.Module, torch.Tensor, torch.Tensor, dict], torch.Tensor]  # with the layer's context
    mlp_inner: tuple[str, ...]  # from a layer to the matrices into the MLP's channels
    mlp_output: str  # from a layer to the matrix from there to the residual stream
    attention_output: str  # from a layer to the matrix from the heads to the residual stream
    window: Window = lambda config: None  # tokens that its attention masks let a token look back; None for all


def _opt_mlp(layer: nn.Module, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    flat = normed.reshape(-1, normed.shape[-1])  # as upstream does, so that results are exactly equal
    return residual + product(layer.fc2, layer.activation_fn(product(layer.fc1, flat))).view(normed.shape)


def _gated_mlp(layer: nn.Module, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    mlp = layer.mlp
    if hooked(mlp):
        return residual + mlp(normed)
    return added(mlp.down_proj, gated(mlp.gate_proj, mlp.up_proj, mlp.act_fn, normed), residual)


def _plain_attention(attention: nn.Module, normed: torch.Tensor, residual: torch.Tensor, context: dict) -> torch.Tensor:
    with linears_widened(normed):
        return residual + attention(hidden_states=normed, **context)[0]  # all families return attention weights too


def _rotary_attention(
    attention: nn.Module, normed: torch.Tensor, residual: torch.Tensor, context: dict
) -> torch.Tensor:
    mask = context.get("attention_mask")
    packed = isinstance(mask, PackedStream)
    whole = mask is None and attention.config._attn_implementation == "sdpa"
    seen = hooked(attention) and not (packed and mask.encodes and only_hooked_by_int8(attention))
    if not (packed or whole) or context.get("past_key_values") is not None or seen:
        return _plain_attention(attention, normed, residual, context)
    query, key, value = (
        product(projection, normed).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (angles.unsqueeze(2) for angles in context["position_embeddings"])
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    states = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    read = mask.attend(*states, attention.scaling) if packed else attend(*states, attention.scaling)
    return added(attention.o_proj, read.flatten(2), residual)


def _window_of_types(config: PretrainedConfig) -> int | None:
    return config.sliding_window if config.layer_types[0] == "sliding_attention" else None


_LLAMA = Architecture(
    decoder="model",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp_modules=("mlp",),
    final_norm="norm",
    norm=rms_norm,
    mlp=_gated_mlp,
    attention=_rotary_attention,
    mlp_inner=("mlp.gate_proj", "mlp.up_proj"),
    mlp_output="mlp.down_proj",
    attention_output="self_attn.o_proj",
)
_OPT = Architecture(
    decoder="model.decoder",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    mlp_modules=("fc1", "activation_fn", "fc2"),  # some activations have weights
    final_norm="final_layer_norm",
    norm=lambda norm, hidden: norm(hidden),
    mlp=_opt_mlp,
    attention=_plain_attention,
    mlp_inner=("fc1",),
    mlp_output="fc2",
    attention_output="self_attn.out_proj",
)
_MISTRAL = replace(_LLAMA, window=lambda config: config.sliding_window)  # whatever its layer_types say
_QWEN = replace(_LLAMA, window=_window_of_types)
ARCHITECTURES = {"llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN, "qwen3": _QWEN, "opt": _OPT}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Looks a config's family up.

    Raises:
        UnknownName: The family is not in the table.
        UnsupportedArchitecture: The family is, but not this member of it; see `check_member`.
    """
    if config.model_type not in ARCHITECTURES:  # no close name: `model_type` is nothing to correct by hand
        raise UnknownName("model architecture", config.model_type, ARCHITECTURES, suggest=False)
    architecture = ARCHITECTURES[config.model_type]
    check_member(config, architecture.window)
    return architecture


def attention_window(config: PretrainedConfig) -> int | None:
    """Tokens that attention looks back, the own one included; None for all. All layers are alike in this."""
    return ARCHITECTURES[config.model_type].window(config)


def submodule(module: nn.Module, path: str) -> nn.Module:
    return operator.attrgetter(path)(module)


class DecoderLayer:
    """A transformers decoder layer seen as two residual functions.

    Args:
        layer: The upstream module, unchanged.
        architecture: The family's row of the table.
        packed_config: The attention's config for packed streams; None makes one.
    """

    def __init__(
        self, layer: nn.Module, architecture: Architecture, packed_config: PretrainedConfig | None = None
    ) -> None:
        self.module, self._architecture = layer, architecture
        self._attention_norm = submodule(layer, architecture.attention_norm)
        self._mlp_norm = submodule(layer, architecture.mlp_norm)
        self._mlp_modules = [submodule(layer, path) for path in architecture.mlp_modules]
        # The same weights under a config of its own: upstream chooses the attention function by the config, and if the
        # model's own were changed while a packed stream runs, another thread would generate with it.
        self._packed_attention = twin(layer.self_attn)
        if packed_config is None:
            packed_config = copy.copy(layer.self_attn.config)
            packed_config._attn_implementation = PACKED_ATTENTION
        self._packed_attention.config = packed_config

    @property
    def device(self) -> torch.device:
        return next(iter(submodule(self.module, self._architecture.attention_output)._parameters.values())).device

    def run(self, kind: str, hidden: torch.Tensor, context: dict) -> torch.Tensor:
        """Adds one site's output to the residual stream, [batch, tokens, hidden] -> the same.

        Args:
            kind: `"attention"` or `"mlp"`.
            hidden: The residual stream in front of the site.
            context: Upstream's keyword arguments to a layer (attention mask, position embeddings, cache).
        """
        row = self._architecture
        if kind == ATTENTION:
            packed = isinstance(context.get("attention_mask"), PackedStream)
            attention = self._packed_attention if packed else self.module.self_attn
            return row.attention(attention, row.norm(self._attention_norm, hidden), hidden, context)
        return row.mlp(self.module, row.norm(self._mlp_norm, hidden), hidden)

    def cuts(self, kind: str) -> dict[str, Cut]:
        """The parts of a site by name."""
        row = self._architecture
        if kind == ATTENTION:
            return cut_attention(self.module, row.attention_output)
        return cut_mlp(self.module, row.mlp_inner, row.mlp_output)

    def output_path(self, kind: str) -> str:
        """Path of the matrix from a site's heads or channels back to the residual stream."""
        return self._architecture.attention_output if kind == ATTENTION else self._architecture.mlp_output

    def output(self, kind: str) -> nn.Linear:
        """That matrix."""
        return submodule(self.module, self.output_path(kind))

    def output_slices(self, kind: str) -> list[slice]:
        """Which of its inputs belong to each part of a site."""
        return [cut[self.output_path(kind)][1] for cut in self.cuts(kind).values()]

    def narrowed(
        self, kind: str, parts: Sequence[int], refit: tuple[torch.Tensor, torch.Tensor | None] | None = None
    ) -> "DecoderLayer":
        """The layer with some parts of one site; see `rap_env.llm.parts.narrowed`.

        Args:
            kind: Of the site.
            parts: Which of the site's, at least one.
            refit: Another output matrix for them, with its bias; without a bias the layer's own stays.
        """
        cuts = list(self.cuts(kind).values())
        module = narrowed(self.module, [cuts[part] for part in parts])
        if refit is not None:
            replace_linear(module, self.output_path(kind), *refit)
        return DecoderLayer(module, self._architecture, self._packed_attention.config)

    def with_tensors(self, tensors: Mapping[tuple[str, str], torch.Tensor]) -> "DecoderLayer":
        """The layer with other tensors in some places; see `rap_env.llm.parts.with_tensors`."""
        module = with_tensors(self.module, tensors)
        return DecoderLayer(module, self._architecture, self._packed_attention.config)

    def with_modules(self, kind: str, made: Callable[[nn.Module], nn.Module]) -> "DecoderLayer":
        """The layer with other modules for the norms and matrices of one site, but for those whose calls somebody sees.

        Args:
            kind: Of the site.
            made: Gives the module that stands in for one that holds a norm or a matrix.
        """
        norms = [self._architecture.mlp_norm]
        if kind == ATTENTION:
            of_heads = ["self_attn.q_norm", "self_attn.k_norm"] if hasattr(self.module.self_attn, "q_norm") else []
            norms = [self._architecture.attention_norm, *of_heads]
        paths = [*norms, *next(iter(self.cuts(kind).values()))]
        modules = {path: submodule(self.module, path) for path in paths}
        module = with_modules(self.module, {path: made(one) for path, one in modules.items() if not hooked(one)})
        return DecoderLayer(module, self._architecture, self._packed_attention.config)

    def modules_of(self, kind: str) -> list[nn.Module]:
        """The modules that hold a site's weights, without the norm in front."""
        return [self.module.self_attn] if kind == ATTENTION else self._mlp_modules


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The layers of a causal LM, first to last."""
    architecture = architecture_of(model.config)
    return [DecoderLayer(layer, architecture) for layer in submodule(model, architecture.decoder).layers]


def run_steps(steps: list[tuple[DecoderLayer, str]], hidden_states: torch.Tensor, **context) -> torch.Tensor:
    """Adds the outputs of sites to the residual stream, [batch, tokens, hidden] -> the same; see `DecoderLayer.run`."""
    for layer, kind in steps:
        if hidden_states.device != layer.device:  # another card than that of the layer before
            hidden_states, context = moved(hidden_states, layer.device), moved(context, layer.device)
        hidden_states = layer.run(kind, hidden_states, context)
    return hidden_states
