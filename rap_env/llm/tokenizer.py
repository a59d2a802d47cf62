"""A tokenizer's digest: equal exactly where texts become the same token ids."""

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

# A pad token fills what attention masks out, and lm-eval sets a missing one; so it is left out.
_SETTINGS = ("add_bos_token", "add_eos_token", "chat_template", "model_max_length", "split_special_tokens")
_ABOUT_LOADING = ("name_or_path", "is_local", "local_files_only", "cache_dir", "backend", "max_length")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that changes token ids, hexadecimal; the same in every process and for every folder.

    Padding and truncation are left out: calling a fast tokenizer leaves their state behind in its backend.

    Args:
        tokenizer: A fast one, described by its backend with normalizer, merges and post-processor, or a slow one,
            described by its class, vocabulary, vocabulary files and plain settings.
    """
    if tokenizer.is_fast:
        tokens = json.loads(tokenizer.backend_tokenizer.to_str())
        tokens = {name: part for name, part in tokens.items() if name not in ("padding", "truncation")}
    else:
        tokens = _slow(tokenizer)
    content = {
        "special_tokens": {n: str(token) for n, token in tokenizer.special_tokens_map.items() if n != "pad_token"},
        "settings": {name: getattr(tokenizer, name, None) for name in _SETTINGS},
        "tokens": tokens,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _slow(tokenizer: PreTrainedTokenizerBase) -> dict:
    options = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, bool | int | float | str)
        and not name.endswith("_file")
        and not name.startswith(("pad", "truncation"))
        and name not in (*_ABOUT_LOADING, *_SETTINGS)
    }
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(NotImplementedError):  # a tokenizer without vocabulary files
            tokenizer.save_vocabulary(folder)
        for path in Path(folder).iterdir():
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
        "added": {index: repr(token) for index, token in tokenizer.added_tokens_decoder.items()},
        "options": options,
        "files": files,
    }
