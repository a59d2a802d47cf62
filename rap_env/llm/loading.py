"""Loads real models by name or folder, and builds tiny random ones for tests."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rap_env.errors import ModelUnavailable, RapError, UnknownName, check_known
from rap_env.llm.architecture import architecture_of, submodule
from rap_env.llm.checkpoint import check_files, check_weights, forget_quantisation, weights_in
from rap_env.llm.embedded import EMBEDDED_NAME, embedded_folder
from rap_env.llm.formats import KV_CACHES, WeightFormats, check_weights_known, quantise
from rap_env.llm.placement import SPREAD, spread
from rap_env.llm.shape import GRANULARITIES, skeleton
from rap_env.llm.switchable import SwitchableLLM
from rap_env.rng import isolated_rng

TINY_NAME = "tiny"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_llm(  # noqa: PLR0913 - its arguments are the keys of a YAML
    name: str = EMBEDDED_NAME,
    dtype: str = "bfloat16",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    granularity: str = "block",
    weights: WeightFormats = "full",
    kv_cache: str = "full",
) -> SwitchableLLM:
    """Loads a causal LM from safetensors or GGUF weights.

    Args:
        name: `"smollm2-135m"` (embedded, needs nothing), `"tiny"` (random weights, for trying things out), a local
            folder, or a hub name of the form `owner/model`.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`.
        device: A torch device, or `"auto"` for the first GPU if there is one, else the CPU; or `"spread"`, all GPUs
            that the process sees, with a run of layers on each: for evaluation by text only, not for generation.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Lets the repository run its own Python code; off unless you set it.
        granularity: What is a component: `"block"`, whole attentions and MLPs, or `"group"`, KV heads with their query
            heads and groups of 64 MLP channels.
        weights: `"full"`, as loaded, in `dtype`; or `"int8"`, `"int4"`, `"int4g32"`, quantised then; or a mapping from
            names of sites to these, the others being INT8; see `quantise`.
        kv_cache: `"full"`, in `dtype`, or `"int8"`.

    Raises:
        UnknownName: Name, dtype, granularity, a format or a site are none of the above, or the model's family is not
            supported.
        UnsupportedArchitecture: The family is supported, but not this member of it, or not in this format.
        ModelUnavailable: No network, no such repository, access not granted, no weights in a safe format, or files and
            config that disagree.
    """
    if dtype not in _DTYPES:
        raise UnknownName("dtype", dtype, _DTYPES)
    check_known("granularity", granularity, GRANULARITIES)
    check_weights_known(weights)
    check_known("format of the KV cache", kv_cache, KV_CACHES)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device == SPREAD and not torch.cuda.device_count():
        raise UnknownName("device", device, ["cpu", "auto", "cuda"], suggest=False)
    transformers_logging.disable_progress_bar()
    if name == TINY_NAME:
        tiny = build_tiny_llm(dtype=dtype, device="cpu" if device == SPREAD else device)
        return SwitchableLLM(quantise(tiny.model, weights, kv_cache), tiny.tokenizer, tiny.name, granularity)
    source = str(embedded_folder()) if name == EMBEDDED_NAME else name
    if not Path(source).expanduser().is_dir() and not _HUB_NAME.fullmatch(source):
        raise UnknownName("model or folder", name, [EMBEDDED_NAME, TINY_NAME, "a folder", "owner/model on the hub"])
    model, tokenizer = _from_pretrained(source, _DTYPES[dtype], revision, trust_remote_code)
    return SwitchableLLM(quantise(_placed(model, device), weights, kv_cache), tokenizer, name, granularity)


def _placed(model: nn.Module, device: str) -> nn.Module:
    if device != SPREAD:
        return model.to(device)
    decoder = submodule(model, architecture_of(model.config).decoder)
    return spread(model, decoder, [f"cuda:{index}" for index in range(torch.cuda.device_count())])


def _from_pretrained(source: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool):
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder)
        options |= weights_in(folder)
    try:
        if not folder.is_dir():
            _check_hub(source, revision)
        described = _from_config(source, options)  # before any weights are fetched or read
        if folder.is_dir() and "gguf_file" not in options:
            check_files(folder, described)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # Mismatched sizes are refused below, in one line.
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except RapError:
        raise
    except Exception as error:
        raise _explain(error, source) from error
    check_weights(source, model, report)
    if "gguf_file" in options:
        forget_quantisation(model)
    return model, tokenizer


def _from_config(source: str, options: Mapping[str, Any]) -> nn.Module:
    """The model that a config describes, without weights; a config that transformers stumbles over is refused."""
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError) as error:
        raise _not_valid(source, error) from error
    try:
        return skeleton(config)
    except RapError:
        raise
    except Exception as error:
        raise _not_valid(source, error) from error


def _not_valid(source: str, error: Exception) -> ModelUnavailable:
    reason = " ".join(str(error).split())
    return ModelUnavailable(f"can't load {source!r}: its config is not valid: {reason[:200]}")


def _check_hub(source: str, revision: str | None) -> None:
    """Asks the hub once: the download itself would retry for minutes before it admits that there is no network."""
    if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(source, revision=revision, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError):  # a GatedRepoError is one of the former
        raise
    except Exception as error:
        raise ConnectionError(str(error)) from error


def _explain(error: Exception, source: str) -> ModelUnavailable:
    """Turns what the hub client and transformers raise into one message that says what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        advice = f"the model is gated: ask for access at https://huggingface.co/{source}, then run `hf auth login`"
    elif any(isinstance(cause, ConnectionError) for cause in causes) or "couldn't connect" in str(error):
        advice = "the hub can't be reached and the model is not in its cache: check the network, or name a local folder"
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        advice = "no such model on the hub, or a private one: check the name, or run `hf auth login`"
    elif any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        advice = "the repository has no such revision: check model.revision"
    elif "a file named model.safetensors" in str(error):
        advice = "the repository has no safetensors weights; pickled ones are not loaded: convert them first"
    elif "trust_remote_code" in str(error):
        advice = "the repository wants to run its own code: read it, then set model.trust_remote_code=true"
    else:  # of the files: libraries raise anything on damaged ones, and the cause stays chained
        kind = "" if isinstance(error, OSError | ValueError | SafetensorError) else f"{type(error).__name__}: "
        advice = kind + next(iter(str(error).splitlines()), "its files can't be read")[:300]
    return ModelUnavailable(f"can't load {source!r}: {advice}")


def build_tiny_llm(
    model_type: str = "llama", n_layers: int = 4, seed: int = 0, dtype: str = "float32", device: str = "cpu"
) -> SwitchableLLM:
    """Builds a random model of a few thousand parameters, for tests and dry runs; see `build_random_llm`."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": n_layers, "vocab_size": 257}
    sizes["initializer_range"] = 0.2  # large enough for every component to matter
    if model_type == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512}
    else:
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192}
    if model_type == "mistral":
        sizes |= {"sliding_window": None}
    return build_random_llm(model_type, sizes, seed, dtype, device)


def build_random_llm(
    model_type: str, sizes: Mapping[str, Any], seed: int = 0, dtype: str = "float32", device: str = "cpu"
) -> SwitchableLLM:
    """Builds a model with random weights and a byte-level tokenizer: what it costs is real, what it says is not.

    Args:
        model_type: A family of the architecture table.
        sizes: Entries of the family's config; the vocabulary holds at least 257 tokens.
        seed: Seed of the weights.
        dtype: As in `load_llm`.
        device: As in `load_llm`.
    """
    config = AutoConfig.for_model(model_type, bos_token_id=256, eos_token_id=256, pad_token_id=256, **sizes)
    architecture_of(config)
    with isolated_rng(seed), torch.device(device):  # made where they stay: 7 billion weights take minutes on a CPU
        model = AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype])
    return SwitchableLLM(model, _byte_tokenizer(), f"random-{model_type}")


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<end>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>")
