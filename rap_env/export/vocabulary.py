"""A tokenizer's vocabulary as GGUF files hold it: byte-level BPE that llama.cpp splits text for like transformers."""

import json
from dataclasses import dataclass
from typing import Any

import gguf

from rap_env.errors import ExportRefused

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PLAIN_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _split(digits: str) -> dict[str, Any]:
    pattern = {"Regex": f"{_ENDINGS}|{_WORDS}|{digits}|{_REST}"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


# llama.cpp knows pre-tokenizers by name: which steps of the tokenizers library each name stands for.
_PRE_TOKENIZERS = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [_split(r"\p{N}{1,3}"), _PLAIN_BYTES],
    "qwen2": [_split(r"\p{N}"), _PLAIN_BYTES],
}
_IGNORE_MERGES = {"llama-bpe"}  # whole words of the vocabulary are taken before any merge


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer."""

    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]  # ids by gguf's names: bos, eos, pad, unk
    adds_bos: bool
    chat_template: str | None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: Any, n_rows: int) -> Vocabulary:
    """Reads a transformers tokenizer.

    Args:
        tokenizer: One of the tokenizers library's.
        n_rows: Rows of the model's embedding; those without a token get a name of their own.

    Raises:
        ExportRefused: It is no byte-level BPE, splits text in a way that llama.cpp has no name for, or has no merges.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ExportRefused("expected a tokenizer of the tokenizers library; a GGUF file can't hold this one")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = data["model"], data["added_tokens"]
    name = _pre_tokenizer(data)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise ExportRefused("expected a tokenizer with merges, without which llama.cpp reads no BPE; got none")
    tokens, types = [f"[PAD{row}]" for row in range(n_rows)], [int(gguf.TokenType.UNUSED)] * n_rows
    for token, row in model["vocab"].items():
        tokens[row], types[row] = token, int(gguf.TokenType.NORMAL)
    for token in added:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], int(kind)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids |= {"padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    template = tokenizer.chat_template
    return Vocabulary(
        pre_tokenizer=name,
        tokens=tokens,
        types=types,
        merges=merges,
        special={key: value for key, value in ids.items() if value is not None},
        adds_bos=tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id,
        chat_template=template if isinstance(template, str) else None,
    )


def _pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text."""
    model, step = data["model"], data["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = f"{model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}"
        raise ExportRefused(f"expected a tokenizer with byte-level BPE, which a GGUF file can hold here; got {kind}")
    if (data["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}:
        raise ExportRefused(f"expected a tokenizer that changes no text; got the normalizer {data['normalizer']}")
    steps = step.get("pretokenizers", [step])
    steps = [{key: value for key, value in one.items() if key != "trim_offsets"} for one in steps]
    for name, known in _PRE_TOKENIZERS.items():
        if steps == known and bool(model.get("ignore_merges")) == (name in _IGNORE_MERGES):
            return name
    raise ExportRefused(
        f"expected a tokenizer that splits text like {', '.join(_PRE_TOKENIZERS)}, which llama.cpp knows; got"
        f" {str(steps)[:200]}"
    )
