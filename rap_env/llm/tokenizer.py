"""What turns text into tokens, as one digest: two tokenizers with the same one read every text alike."""

import hashlib
import json


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 over a transformers tokenizer, hexadecimal; not over the padding or truncation that a call left behind.

    Args:
        tokenizer: A fast tokenizer, whose whole pipeline is read, or a slow one, of which vocabulary and settings are.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        pipeline = {"vocabulary": tokenizer.get_vocab(), "settings": tokenizer.init_kwargs}
    else:
        pipeline = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    entries = {
        "pipeline": pipeline,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "adds_bos": getattr(tokenizer, "add_bos_token", None),
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()
