"""Number formats: turns a loaded model into one whose weights, or whose KV cache, are INT8 or INT4, in place."""

from collections.abc import Mapping

from torch import nn

from rap_env.components import ATTENTION, KINDS, MLP, Site
from rap_env.errors import UnknownName, UnsupportedArchitecture, check_known
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.int4 import Int4Linear, check_int4
from rap_env.llm.int8_cache import cache_in_int8
from rap_env.llm.quantised import Int8Embedding, Int8Linear, QuantisedLinear

_GROUPS = {"int4": 64, "int4g32": 32}  # inputs that share a scale; 576, SmolLM2's width, is no multiple of 128
WEIGHTS = ("full", "int8", *_GROUPS)
KV_CACHES = ("full", "int8")

WeightFormats = str | Mapping[str, str]  # one for all sites, or those of some by the site's name; the others are INT8
Matrices = dict[str, nn.Module]  # linear layers of a site, by path in its decoder layer


def quantise(model: nn.Module, weights: WeightFormats = "full", kv_cache: str = "full") -> nn.Module:
    """Quantises a model in place, by its weights alone, without any text, and returns it; what it had is released.

    What changes are the matrices of all attentions and MLPs, the embedding and the head; both of the latter become INT8
    and share one matrix where they were tied. Norms, biases and learned positions stay. The number format of all else,
    activations included, stays the model's. A `SwitchableLLM` that was made of the model before is not to be used
    any more: make it anew.

    Args:
        model: A causal LM, on any device; on the meta device only the sizes are real.
        weights: `"full"`, as they were loaded; `"int8"`, a symmetric scale for each output; `"int4"`, a scale and a
            zero point for each output and 64 inputs; or `"int4g32"`, the same for each 32 inputs. Or a mapping from
            names of sites (`layer3.mlp`) to these; sites that it does not name become INT8, embedding and head too.
        kv_cache: `"full"`, or `"int8"`: a scale for each token and head; see `cache_in_int8`.

    Raises:
        UnknownName: There is no such format or site, or the architecture table does not know the model's family.
        UnsupportedArchitecture: A matrix can't be INT4, has another form than a linear layer, or is quantised already.
    """
    check_weights_known(weights)
    check_known("format of the KV cache", kv_cache, KV_CACHES)
    layers = [layer.module for layer in decoder_layers(model)]
    if weights != "full":
        if not isinstance(model.lm_head, nn.Linear):
            raise UnsupportedArchitecture(f"expected weights as they were loaded to make {weights}; got quantised ones")
        sites = site_matrices(model)
        formats = _formats_of(list(sites), weights)
        put_matrices(model, {site: in_format(site, matrices, formats[site]) for site, matrices in sites.items()})
        _quantise_vocabulary(model)
    if kv_cache == "int8":
        for layer in layers:
            cache_in_int8(layer.self_attn)
    return model


def check_weights_known(weights: WeightFormats) -> None:
    """Refuses unknown formats; names of sites are known when the model is.

    Raises:
        UnknownName: There is no such format.
    """
    for each in weights.values() if isinstance(weights, Mapping) else [weights]:
        check_known("format of weights", each, WEIGHTS)


def site_matrices(model: nn.Module) -> dict[Site, Matrices]:
    """The matrices of all attentions and MLPs, in any format, in the order in which the model runs its sites.

    Raises:
        UnsupportedArchitecture: A matrix has another form than a linear layer.
    """
    sites: dict[Site, Matrices] = {}
    for index, layer in enumerate(decoder_layers(model)):
        own: dict[str, Matrices] = {kind: {} for kind in KINDS}
        for path, module in layer.module.named_modules():
            if isinstance(module, nn.Linear | QuantisedLinear):
                own[ATTENTION if path.startswith("self_attn.") else MLP][path] = module
        paths = {path for matrices in own.values() for path in matrices}
        for name, weight in layer.module.named_parameters():
            if weight.ndim > 1 and name.rpartition(".")[0] not in paths:
                raise UnsupportedArchitecture(f"expected matrices in linear layers, which can be quantised; got {name}")
        sites |= {Site(index, kind): matrices for kind, matrices in own.items()}
    return sites


def in_format(site: Site, matrices: Mapping[str, nn.Linear], weights: str) -> Matrices:
    """A site's matrices as they were loaded, in a number format; what is given stays as it is.

    Raises:
        UnsupportedArchitecture: A matrix can't be INT4.
    """
    if weights == "full":
        return dict(matrices)
    made, group = {}, _GROUPS.get(weights)
    for path, linear in matrices.items():
        bias = None if linear.bias is None else linear.bias.detach()
        if group is None:
            made[path] = Int8Linear(linear.weight, bias)
        else:
            check_int4(f"layer{site.layer}.{path}", linear.weight, group)
            made[path] = Int4Linear(linear.weight, bias, group)
    return made


def put_matrices(model: nn.Module, sites: Mapping[Site, Matrices]) -> None:
    """Puts matrices in the place of those that sites have; a `SwitchableLLM` wants `weights_changed` then."""
    layers = decoder_layers(model)
    for site, matrices in sites.items():
        for path, matrix in matrices.items():
            parent, _, name = path.rpartition(".")
            setattr(layers[site.layer].module.get_submodule(parent), name, matrix)


def _formats_of(sites: list[Site], weights: WeightFormats) -> dict[Site, str]:
    if not isinstance(weights, Mapping):
        return dict.fromkeys(sites, weights)
    names = [site.name for site in sites]
    for name in weights:
        if name not in names:
            raise UnknownName("site", name, names)
    return {site: weights.get(site.name, "int8") for site in sites}


def _quantise_vocabulary(model: nn.Module) -> None:
    embedding, head = model.get_input_embeddings(), model.lm_head
    rows = Int8Embedding(embedding.weight)
    tied = head.weight is embedding.weight
    model.set_input_embeddings(rows)
    model.lm_head = Int8Linear(rows.weight, head.bias, rows.scales) if tied else Int8Linear(head.weight, head.bias)
    if tied:  # one tensor, counted and moved once
        model.lm_head.weight, model.lm_head.scales = rows.weight, rows.scales
