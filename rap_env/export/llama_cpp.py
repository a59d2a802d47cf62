"""What llama.cpp computes with a GGUF file: read by the package `xllamacpp`, where it is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from rap_env.errors import ExportRefused
from rap_env.export.vocabulary import Vocabulary

LIBRARY = "xllamacpp"
_CONTEXT_TOKENS = 256
_MOST_PROBABILITIES = 1000


def is_installed() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


class Reader:
    """A GGUF file that llama.cpp has loaded.

    Args:
        path: The file.
        vocabulary: What it holds of the tokenizer.
        vocab_size: Tokens that the model knows.

    Raises:
        ExportRefused: llama.cpp can't load the file.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, vocab_size: int) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = _CONTEXT_TOKENS, 1, 0
        options.warmup, options.verbosity = False, 0
        # As many as PyTorch takes: threads that wait for others spin, and a busy machine makes them wait long.
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(options)
        except RuntimeError as error:
            raise ExportRefused(f"llama.cpp can't load the GGUF file: {error}; nothing was written") from error
        # A token of letters is drawn whatever its probability: those of half a character or of an end of text are not
        # shown. The probabilities that are shown are the model's own.
        drawn = next(row for row, token in enumerate(vocabulary.tokens) if token.isascii() and token.isalpha())
        self._request = {"n_predict": 1, "temperature": 0, "logit_bias": [[drawn, 1e6]]}
        self._request["n_probs"] = min(vocab_size, _MOST_PROBABILITIES)

    def next_token(self, prompt: str | Sequence[int], from_cache: bool = True) -> dict[int, float]:
        """Log-probabilities of the token after a text, likeliest first: all of them, or a thousand.

        Args:
            prompt: Text, or token ids.
            from_cache: Whether what it shares with the prompt before is taken from the KV cache.

        Raises:
            ExportRefused: llama.cpp answers with an error.
        """
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        answer = self._server.handle_completions(self._request | {"prompt": prompt, "cache_prompt": from_cache})
        if "choices" not in answer:
            raise ExportRefused(f"llama.cpp can't run the GGUF file: {answer}; nothing was written")
        (step,) = answer["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
