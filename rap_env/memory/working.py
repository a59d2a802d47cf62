"""The memory of evaluating masks, beside the weights: predicted bytes."""

_WIDEST_HEAD = 256  # channels; flash attention takes no wider ones
_INDEX_BYTES = 32  # of each token: itself, its position, and where its answer is read, all int64
_SCRATCH_BYTES = 16 * 2**20  # what matrix libraries, Python and the C library's heap take, whatever the model


def working_bytes(shape, tokens: int, held_streams: int, head_rows: int = 128) -> int:
    """Predicts the peak bytes, beside the weights, of evaluating masks over one residual stream.

    Upstream's modules run one after the other, so of their parts only the largest counts. With `b` bytes a parameter,
    `h` the hidden size, `q` and `k` the query and KV channels, `m` the MLP channels, `V` the vocabulary, `N` tokens and
    `R` the head's rows, at most `N`:

        streams   = N * b * h * (1 + held streams)
        context   = N * (2 * b * min(k, 256) + 32)
        norm      = N * 8 * h
        attention = N * (b * h + max(b * (4 * q + 2 * k), b * (2 * q + 5 * k), (b + 8) * q))
        MLP       = N * b * (h + 3 * m)
        head      = N * b * h + R * (b * h + V * (8 + cast)), cast = b below 4 bytes, else 0
        working   = streams + context + max(norm, attention, MLP, head) + 16 MiB

    - Streams: the one that runs, and those that are held: what waits where masks part, what a caller passed in and
      keeps, and what it was given last.
    - Context: sines and cosines, as wide as one attention head, of which the shape says only that it is no wider than
      `k`; int64 tokens and positions.
    - Norm: two float32 copies at once, whatever the dtype.
    - Attention: the normed stream with queries, keys, values, and what rotating takes: three more of the queries, or
      the rotated queries and three more of the keys. Repeated keys and values with the output, or the output twice
      (packed streams put the parts together), are no more than that. Qwen3 norms each head's queries: once in `b`
      bytes, twice in float32. Scores are never materialised, as in flash and memory-efficient attention.
    - MLP: the normed stream with gate, up and product.
    - Head: a copy of the states that are read, at most all, and their norm; float32 logits with log-softmax's copy of
      them, or with the rows before, which live until the next ones, in the model's dtype too, are cast.

    The sum bounds what tensors take at once from above, loosely only for families with less in a sub-block (OPT has no
    gate). On SmolLM2 in both dtypes, with 1,024 and 4,096 tokens, 0.83 to 0.93 of it was measured. Not counted are:

    - attention masks of trees with branches: 1 + `b` bytes for each pair of tokens in a tree, 11 while they are built;
      the prediction still held with 4,096 tokens in trees of 2,048;
    - what the C library keeps of freed memory: by default a process took up to 1.9 times the prediction;
      `rap_env.memory.measured.return_freed_memory` stops glibc from keeping it.

    Args:
        shape: A `ModelShape`.
        tokens: Tokens of the residual stream, over all its sequences.
        held_streams: Further streams [tokens, hidden] that are alive meanwhile, the callers' own included.
        head_rows: Rows of logits that are computed at once.
    """
    size, hidden, mlp = shape.bytes_per_parameter, shape.hidden_size, shape.intermediate_size
    query, kv = shape.query_channels, shape.kv_channels
    rows, cast = min(head_rows, tokens), size if size < 4 else 0
    context = tokens * (2 * size * min(kv, _WIDEST_HEAD) + _INDEX_BYTES)
    largest = max(
        tokens * 8 * hidden,
        tokens * (size * hidden + max(size * (4 * query + 2 * kv), size * (2 * query + 5 * kv), (size + 8) * query)),
        tokens * size * (hidden + 3 * mlp),
        tokens * size * hidden + rows * (size * hidden + shape.vocab_size * (8 + cast)),
    )
    return (1 + held_streams) * tokens * size * hidden + context + largest + _SCRATCH_BYTES
