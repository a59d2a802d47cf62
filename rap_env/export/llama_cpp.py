"""What llama.cpp computes with a GGUF file: read by the package `xllamacpp`, where it is installed."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rap_env.errors import ExportRefused

LIBRARY = "xllamacpp"
_MOST_PROBABILITIES = 1000  # of the likeliest tokens, for each prompt


def is_installed() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


def next_tokens(
    path: Path, prompts: Sequence[Sequence[int]], vocab_size: int, printable: int
) -> Iterator[dict[int, float]]:
    """Yields log-probabilities of the token after each prompt, by token; all of them, or the likeliest thousand.

    Prompts that begin like the one before are continued from the KV cache.

    Args:
        path: The GGUF file.
        prompts: Token ids.
        vocab_size: Tokens that the model knows.
        printable: A token of printable ASCII. It is drawn whatever its probability, because the probabilities of half a
            character or of an end of text are not shown; those that are shown are the model's own.

    Raises:
        ExportRefused: llama.cpp can't load the file.
    """
    server = _server(path, context=max(map(len, prompts)) + 8)
    for prompt in prompts:
        request = {"prompt": list(prompt), "n_predict": 1, "temperature": 0, "cache_prompt": True}
        request |= {"n_probs": min(vocab_size, _MOST_PROBABILITIES), "logit_bias": [[printable, 1e6]]}
        answer = server.handle_completions(request)
        (step,) = answer["choices"][0]["logprobs"]["content"]
        yield {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}


def _server(path: Path, context: int) -> Any:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.n_gpu_layers = context, 1, 0
    options.warmup, options.verbosity = False, 0
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        return xllamacpp.Server(options)
    except RuntimeError as error:
        raise ExportRefused(f"llama.cpp can't load the GGUF file: {error}; nothing was written") from error
