"""What a mask leaves of a model: widths and weights of its layers, and the logits that every format has to give."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from rap_env.components import ATTENTION
from rap_env.errors import ExportRefused
from rap_env.llm.architecture import Architecture, architecture_of, decoder_layers
from rap_env.llm.int8_cache import in_int8
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites

Weights = Mapping[str, torch.Tensor]
_CHECKED_TOKENS = 2, 24  # sequences and their length: enough for every matrix and for several decoding steps


@dataclass(frozen=True)
class KeptLayer:
    """A layer of which at least one site is kept.

    Attributes:
        query_heads: Heads of its attention; 0 where that is dropped.
        kv_heads: Heads of its KV cache; 0 where the attention is dropped.
        mlp_channels: Channels inside its MLP; 0 where that is dropped.
        weights: Tensors by their names in the layer; those of dropped sites and of their norms are not among them.
    """

    query_heads: int
    kv_heads: int
    mlp_channels: int
    weights: Weights

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.query_heads, self.kv_heads, self.mlp_channels

    @property
    def biased(self) -> set[str]:
        """Paths of its matrices that have a bias."""
        biases = (name.removesuffix(".bias") for name in self.weights if name.endswith(".bias"))
        return {path for path in biases if self.weights[f"{path}.weight"].ndim == 2}  # norms have biases of their own

    def with_biases(self, paths: Collection[str]) -> "KeptLayer":
        """The same with a bias on each of these matrices that it has: zeros where there was none."""
        matrices = {
            f"{path}.bias": self.weights[f"{path}.weight"] for path in paths if f"{path}.weight" in self.weights
        }
        zeros = {name: matrix.new_zeros(matrix.shape[0]) for name, matrix in matrices.items()}
        return replace(self, weights=zeros | dict(self.weights))


@dataclass(frozen=True)
class PrunedModel:
    """A model without what its mask drops.

    Attributes:
        config: That of the unpruned model.
        generation_config: The same.
        tokenizer: The same.
        layers: Those of which anything is kept.
        fixed: What no mask drops, by its name in the model: embeddings, the last norm, the head where it is not tied.
        tokens: Sequences [B, T] that its files are checked on.
        logits: What the model gives for them, [B, T, V] in float32.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig
    tokenizer: Any
    layers: tuple[KeptLayer, ...]
    fixed: Weights
    tokens: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, llm: SwitchableLLM, mask: PruningMask) -> "PrunedModel":
        """Takes the weights that a masked model runs with.

        Raises:
            InvalidMask: The mask belongs to another model, or to another granularity.
            ExportRefused: It keeps nothing at all, or the model is quantised.
        """
        llm.check(mask)
        if not isinstance(llm.model.lm_head, nn.Linear) or in_int8(decoder_layers(llm.model)[0].module.self_attn):
            raise ExportRefused(
                "expected weights and a KV cache in the model's own type, which exports hold; got quantised ones: load"
                " the model with weights='full' and kv_cache='full'"
            )
        by_layer: dict[int, dict[str, nn.Module]] = {}
        for site in kept_sites(mask):
            by_layer.setdefault(site.layer, {})[site.kind] = llm.layer_of(site).module
        if not by_layer:
            raise ExportRefused("expected a mask that keeps at least one attention or MLP; this one drops all of them")
        n_tokens = _CHECKED_TOKENS[0] * _CHECKED_TOKENS[1]
        tokens = torch.arange(1, n_tokens + 1).mul(7919).remainder(llm.shape.vocab_size).view(_CHECKED_TOKENS)
        with llm.pruned(mask), torch.inference_mode():
            logits = llm.model(tokens.to(llm.device)).logits.float().cpu()
        row = architecture_of(llm.model.config)
        layers = tuple(_kept_layer(row, sites) for sites in by_layer.values())
        own = (llm.model.config, llm.model.generation_config, llm.tokenizer)
        return cls(*own, layers, _fixed(llm.model), tokens, logits)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.fixed.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.fixed.values())).device

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)

    @cached_property
    def head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def refuse_unlike_llama(self, format: str) -> None:
        """Refuses layers that can't be written as Llama's, for a format that knows no others.

        Args:
            format: What it is, for the message.

        Raises:
            ExportRefused: Says what differs.
        """
        why = None
        if self.config.model_type == "opt":
            why = "OPT has learned positions and layer norms with biases"
        elif self.config.model_type == "qwen3":
            why = "Qwen3 normalises queries and keys"
        elif self.config.hidden_act != "silu":
            why = f"its MLPs use {self.config.hidden_act!r} instead of 'silu'"
        elif self.architecture.window(self.config) is not None:
            why = "its attention looks back on a sliding window"
        if why:
            raise ExportRefused(f"{format} can't hold this model: {why}; export it as hf")

    @property
    def biased(self) -> set[str]:
        """Paths of the matrices that have a bias in any layer."""
        return set().union(*(layer.biased for layer in self.layers))

    def with_biases(self, paths: Collection[str]) -> "PrunedModel":
        """The same with a bias on these matrices in all layers that have them."""
        return replace(self, layers=tuple(layer.with_biases(paths) for layer in self.layers))

    def state(self) -> dict[str, torch.Tensor]:
        """All weights by transformers' names; the layers are numbered anew."""
        state, prefix = dict(self.fixed), f"{self.architecture.decoder}.layers"
        for index, layer in enumerate(self.layers):
            state |= {f"{prefix}.{index}.{name}": tensor for name, tensor in layer.weights.items()}
        return state

    def with_state(self, state: Weights, logits: torch.Tensor) -> "PrunedModel":
        """The same with other weights, by the names that `state` gives them."""
        prefix = f"{self.architecture.decoder}.layers"
        layers = tuple(
            replace(layer, weights={name: state[f"{prefix}.{index}.{name}"] for name in layer.weights})
            for index, layer in enumerate(self.layers)
        )
        return replace(self, layers=layers, fixed={name: state[name] for name in self.fixed}, logits=logits)


def _kept_layer(row: Architecture, sites: Mapping[str, nn.Module]) -> KeptLayer:
    query_heads = kv_heads = mlp_channels = 0
    weights: dict[str, torch.Tensor] = {}
    for kind, layer in sites.items():
        if kind == ATTENTION:
            head = layer.self_attn.head_dim
            query_heads = layer.self_attn.q_proj.weight.shape[0] // head
            kv_heads = layer.self_attn.k_proj.weight.shape[0] // head
            paths = ("self_attn", row.attention_norm)
        else:
            mlp_channels = layer.get_submodule(row.mlp_output).weight.shape[1]
            paths = (*row.mlp_modules, row.mlp_norm)
        for path in paths:
            # Parts that lie side by side are views of whole matrices, of which a file shall hold these parts only.
            state = layer.get_submodule(path).state_dict()
            weights |= {f"{path}.{name}": tensor.contiguous() for name, tensor in state.items()}
    return KeptLayer(query_heads, kv_heads, mlp_channels, weights)


def _fixed(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = f"{architecture_of(model.config).decoder}.layers."
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = model.state_dict().items()
    return {name: tensor for name, tensor in state if not name.startswith(layers) and name not in tied}
