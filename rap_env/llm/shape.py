"""The sizes of a model and what each component costs: counted on its tensors, or on a config's, without weights."""

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rap_env.components import ATTENTION, KINDS, Component, Site, shared
from rap_env.errors import check_known
from rap_env.llm.architecture import DecoderLayer, architecture_of, attention_window, decoder_layers
from rap_env.llm.formats import WeightFormats, quantise
from rap_env.llm.int8_cache import cached_bytes
from rap_env.llm.parts import weight_bytes

GRANULARITIES = ("block", "group")
_MOST = 2**53  # bytes, tokens or channels: beyond that arithmetic in floats is not exact


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, as far as memory and masks need them; holds no weights."""

    model_type: str  # family name of the config
    hidden_size: int  # channels of the residual stream
    intermediate_size: int  # channels inside the MLP
    query_channels: int  # attention heads times head size
    kv_channels: int  # KV heads times head size
    vocab_size: int  # rows of the embedding
    context_tokens: int  # longest sequence the model takes
    attention_window: int | None  # tokens that attention looks back, the own one included; None for all
    bytes_per_parameter: int  # of activations: 2 for float16 and bfloat16, 4 for float32
    fixed_bytes: int  # weights that are always there: embedding, untied head, norms
    components: tuple[Component, ...]  # what can be dropped, in the order in which the model runs it

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", shared(self.components))

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        dtype: torch.dtype | None = None,
        granularity: str = "block",
        weights: WeightFormats = "full",
        kv_cache: str = "full",
    ) -> "ModelShape":
        """Reads the sizes off a transformers config: those of a model that is built on the meta device.

        Args:
            config: The config of a causal LM.
            dtype: Type of the weights; by default the config's, or float16 if it names none.
            granularity: As in `from_model`.
            weights: Number format of the weights, or those of some sites; see `quantise`.
            kv_cache: Number format of the KV cache; see `quantise`.

        Raises:
            UnknownName: The architecture table does not know the family, or there is no such granularity, format or
                site.
            UnsupportedArchitecture: The layers are not alike, or not pre-norm; or the sizes don't allow the format.
        """
        return cls.from_model(quantise(skeleton(config, dtype), weights, kv_cache), granularity)

    @classmethod
    def from_model(cls, model: nn.Module, granularity: str = "block", order: str = "") -> "ModelShape":
        """Counts a model's own tensors, so that biases, query norms, ties and number formats are exactly its own.

        Args:
            model: The causal LM.
            granularity: What is a component: `"block"`, whole sites, or `"group"`, KV heads with their query heads and
                groups of `GROUP_CHANNELS` MLP channels. What a site has beside its groups (a bias or INT8 scales of its
                output, norms of heads) always stays then.
            order: What the order of parts is, where it is not the checkpoint's: names end with `@` and this.

        Raises what `from_config` raises.
        """
        check_known("granularity", granularity, GRANULARITIES)
        config, layers = model.config, decoder_layers(model)
        attention = layers[0].module.self_attn
        components = []
        for index, layer in enumerate(layers):
            for kind in KINDS:
                kv_bytes = cached_bytes(layer.module.self_attn, model.dtype) if kind == ATTENTION else 0
                rows = _rows(layer, Site(index, kind), kv_bytes, granularity)
                components += [replace(row, name=f"{row.name}@{order}") for row in rows] if order else rows
        return cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "ffn_dim", None) or config.intermediate_size,
            query_channels=attention.q_proj.out_features,
            kv_channels=attention.k_proj.out_features,
            vocab_size=config.vocab_size,
            context_tokens=config.max_position_embeddings,
            attention_window=attention_window(config),
            bytes_per_parameter=model.dtype.itemsize,
            fixed_bytes=_n_bytes([model]) - sum(component.weight_bytes for component in components),
            components=tuple(components),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelShape":
        """Builds a shape again from `to_dict`; `TypeError`, `KeyError` or `ValueError` where it is something else."""
        rows = [row | {"site": Site(**row["site"])} for row in values["components"]]
        shape = cls(**{**values, "components": tuple(Component(**row) for row in rows)})
        for each in (shape, *shape.components, *(component.site for component in shape.components)):
            _check_types(each)
        if len(names := {component.name for component in shape.components}) < len(rows) or not names:
            raise ValueError("expected components, and a name of its own for each")
        return shape

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.model_type, self.fixed_bytes, self.components))

    def __hash__(self) -> int:
        return self._hash  # once: shapes are part of many keys

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """What runs, in order."""
        return tuple(site for site, _positions in self.components.sites)

    @property
    def has_parts(self) -> bool:
        """Whether masks can keep a site in part."""
        return self.components.have_parts

    @property
    def n_layers(self) -> int:
        return 1 + max(component.site.layer for component in self.components)

    @property
    def weight_bytes(self) -> int:
        """All weights of the dense model."""
        return self.fixed_bytes + sum(component.weight_bytes for component in self.components)

    def activation_width(self, kind: str) -> int:
        """Channels that a site holds for each token at once, beside the residual stream and its norm."""
        if kind == ATTENTION:
            return 2 * self.query_channels + 2 * self.kv_channels
        return 3 * self.intermediate_size


def _check_types(row: ModelShape | Component | Site) -> None:
    """Refuses what JSON can hold in place of a name, or of a whole number of at least 0."""
    for field in fields(row):
        value = getattr(row, field.name)
        if field.type in (int, int | None):
            is_right = (type(value) is int and 0 <= value < _MOST) or (value is None and field.type is not int)
        elif field.type is str:
            is_right = isinstance(value, str)
        else:
            continue
        if not is_right:
            raise ValueError(f"{field.name}: expected {field.type}; got {str(value)[:40]!r}")


def _rows(layer: DecoderLayer, site: Site, kv_bytes_per_token: int, granularity: str) -> list[Component]:
    """The components of a site."""
    if granularity == "block":
        return [Component(site.name, site, None, _n_bytes(layer.modules_of(site.kind)), kv_bytes_per_token)]
    cuts = layer.cuts(site.kind)
    return [
        Component(f"{site.name}.{name}", site, part, weight_bytes(layer.module, cut), kv_bytes_per_token // len(cuts))
        for part, (name, cut) in enumerate(cuts.items())
    ]


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal LM on the meta device: what `from_config` counts on."""
    architecture_of(config)  # before a model is built from a config that we don't support
    with torch.device("meta"):
        dtype = dtype or getattr(config, "dtype", None) or torch.float16
        # A copy, because upstream writes the type into the config that it builds from.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def _n_bytes(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
