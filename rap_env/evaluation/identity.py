"""Stub."""

ENGINE_VERSION = 2


def engine_identity(llm) -> dict:
    return {"engine": ENGINE_VERSION, "model": llm.digest, "tokenizer": llm.tokenizer_digest, "dtype": str(llm.dtype)}
