"""Memory of judging masks, beyond the weights: predicted bytes, and how many streams a bound allows."""

from rap_env.errors import MemoryBoundTooSmall


def working_bytes(shape, tokens: int, held_streams: int, head_rows: int = 128) -> int:
    stream = tokens * shape.hidden_size * shape.bytes_per_parameter
    width = max(shape.activation_width("attention"), shape.activation_width("mlp"))
    return (held_streams + 4) * stream + tokens * width * shape.bytes_per_parameter + head_rows * shape.vocab_size * 10


def streams_within(shape, tokens: int, memory_bytes: int, head_rows: int = 128) -> int:
    least = working_bytes(shape, tokens, 0, head_rows)
    if memory_bytes < least:
        raise MemoryBoundTooSmall(f"expected at least {least:,} bytes; got {memory_bytes:,}")
    return (memory_bytes - least) // (tokens * shape.hidden_size * shape.bytes_per_parameter)
