"""What the package knows of model families: one table, and the sizes that follow from a config."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rap_env.errors import UnknownName, UnsupportedArchitecture
from rap_env.mask import ATTENTION, KINDS, MLP, Component


@dataclass(frozen=True)
class Architecture:
    """Where a pre-norm decoder family keeps its parts; each string is an attribute path.

    Attributes:
        decoder: From the causal LM to the module that holds the layers.
        attention_norm: From a layer to the norm in front of the attention.
        mlp_norm: From a layer to the norm in front of the MLP.
        mlp_modules: From a layer to the modules that hold the MLP's weights.
        final_norm: From the decoder to the norm behind the last layer.
        mlp: Runs the MLP of a layer on normed hidden states [batch, tokens, hidden].
    """

    decoder: str
    attention_norm: str
    mlp_norm: str
    mlp_modules: tuple[str, ...]
    final_norm: str
    mlp: Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _opt_mlp(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])  # as upstream does, so that results are equal to the bit
    return layer.fc2(layer.activation_fn(layer.fc1(flat))).view(hidden.shape)


_LLAMA = Architecture(
    decoder="model",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp_modules=("mlp",),
    final_norm="norm",
    mlp=lambda layer, hidden: layer.mlp(hidden),
)
_OPT = Architecture(
    decoder="model.decoder",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    mlp_modules=("fc1", "fc2"),
    final_norm="final_layer_norm",
    mlp=_opt_mlp,
)
ARCHITECTURES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "opt": _OPT}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Looks a config's family up.

    Raises:
        UnknownName: The family is not in the table.
        UnsupportedArchitecture: The family is, but this member is not a plain pre-norm stack of equal layers.
    """
    if config.model_type not in ARCHITECTURES:
        raise UnknownName("model architecture", config.model_type, ARCHITECTURES)
    if not getattr(config, "do_layer_norm_before", True) or getattr(config, "_remove_final_layer_norm", False):
        raise UnsupportedArchitecture("expected norms before the sub-blocks; this OPT model has them behind")
    if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        raise UnsupportedArchitecture("expected one type of attention in all layers; got a mix of full and sliding")
    return ARCHITECTURES[config.model_type]


def attention_window(config: PretrainedConfig) -> int | None:
    """Tokens that attention looks back, the own one included; None for all. All layers are alike in this."""
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]  # families without types slide or not
    return getattr(config, "sliding_window", None) if layer_types[0] == "sliding_attention" else None


def submodule(module: nn.Module, path: str) -> nn.Module:
    return operator.attrgetter(path)(module)


class DecoderLayer:
    """A transformers decoder layer seen as two residual functions.

    Shapes: B sequences, T tokens, H hidden size.

    Args:
        layer: The upstream module, unchanged.
        architecture: The family's row of the table.
    """

    def __init__(self, layer: nn.Module, architecture: Architecture) -> None:
        self.module = layer
        self._attention_norm = submodule(layer, architecture.attention_norm)
        self._mlp_norm = submodule(layer, architecture.mlp_norm)
        self._mlp = architecture.mlp
        self._mlp_modules = [submodule(layer, path) for path in architecture.mlp_modules]

    def run(self, kind: str, hidden: torch.Tensor, context: dict) -> torch.Tensor:
        """Adds one sub-block's output to the residual stream, [B, T, H] -> [B, T, H].

        Args:
            kind: `"attention"` or `"mlp"`.
            hidden: The residual stream in front of the sub-block.
            context: Upstream's keyword arguments to a layer (attention mask, position embeddings, cache).
        """
        if kind == ATTENTION:  # every supported family returns (output, attention weights)
            return hidden + self.module.self_attn(hidden_states=self._attention_norm(hidden), **context)[0]
        return hidden + self._mlp(self.module, self._mlp_norm(hidden))

    def modules_of(self, kind: str) -> list[nn.Module]:
        """The modules that hold a component's weights, without the norm in front."""
        return [self.module.self_attn] if kind == ATTENTION else self._mlp_modules


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The layers of a causal LM, first to last."""
    architecture = architecture_of(model.config)
    return [DecoderLayer(layer, architecture) for layer in submodule(model, architecture.decoder).layers]


def count_parameters(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, as far as memory and masks need them; holds no weights.

    Attributes:
        model_type: Family name of the config.
        n_layers: Decoder layers.
        hidden_size: Channels of the residual stream.
        intermediate_size: Channels inside the MLP.
        query_channels: Attention heads times head size.
        kv_channels: KV heads times head size.
        vocab_size: Rows of the embedding.
        context_tokens: Longest sequence the model takes.
        attention_parameters: Parameters of one attention sub-block.
        mlp_parameters: Parameters of one MLP sub-block.
        fixed_parameters: Everything else: embedding, untied head, norms.
        bytes_per_parameter: 2 for float16 and bfloat16, 4 for float32.
    """

    model_type: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    query_channels: int
    kv_channels: int
    vocab_size: int
    context_tokens: int
    attention_parameters: int
    mlp_parameters: int
    fixed_parameters: int
    bytes_per_parameter: int

    @classmethod
    def from_config(cls, config: PretrainedConfig, dtype: torch.dtype | None = None) -> "ModelShape":
        """Reads the sizes off a transformers config, without any weights.

        The parameters are counted on a model built on the meta device, so biases, query norms and tied embeddings are
        exactly upstream's.

        Args:
            config: The config of a causal LM.
            dtype: Type of the weights; by default the config's, or 2 bytes a parameter if it names none.

        Raises:
            UnknownName: The architecture table does not know the family.
            UnsupportedArchitecture: The layers are not alike, or not pre-norm.
        """
        architecture_of(config)
        dtype = dtype or getattr(config, "dtype", None) or torch.float16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = decoder_layers(model)
        per_kind = {kind: count_parameters(layers[0].modules_of(kind)) for kind in KINDS}
        attention = layers[0].module.self_attn
        return cls(
            model_type=config.model_type,
            n_layers=len(layers),
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "ffn_dim", None) or config.intermediate_size,
            query_channels=attention.q_proj.out_features,
            kv_channels=attention.k_proj.out_features,
            vocab_size=config.vocab_size,
            context_tokens=config.max_position_embeddings,
            attention_parameters=per_kind[ATTENTION],
            mlp_parameters=per_kind[MLP],
            fixed_parameters=count_parameters([model]) - len(layers) * sum(per_kind.values()),
            bytes_per_parameter=dtype.itemsize,
        )

    @functools.cached_property
    def components(self) -> tuple[Component, ...]:
        """All components in the order in which the model runs them."""
        return tuple(Component(layer, kind) for layer in range(self.n_layers) for kind in KINDS)

    @property
    def n_parameters(self) -> int:
        return self.fixed_parameters + self.n_layers * (self.attention_parameters + self.mlp_parameters)

    def parameters_of(self, component: Component) -> int:
        return self.attention_parameters if component.kind == ATTENTION else self.mlp_parameters

    def activation_width(self, kind: str) -> int:
        """Channels that a sub-block holds for each token at once, beside the residual stream and its norm."""
        if kind == ATTENTION:
            return 2 * self.query_channels + 2 * self.kv_channels
        return 3 * self.intermediate_size
