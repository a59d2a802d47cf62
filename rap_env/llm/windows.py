"""Windows of text: how many of how many tokens a model can be measured on."""

import numbers

from rap_env.errors import InvalidWorkload


def check_windows(n_windows: int, tokens: int, context_tokens: int | None = None) -> None:
    """Refuses windows that nothing can be measured on: for a tensor, `check_windows(*windows.shape, context_tokens)`.

    Args:
        n_windows: Number of windows.
        tokens: Tokens of each; the first is not scored.
        context_tokens: Longest sequence that the model takes; None where no model is known yet.

    Raises:
        InvalidWorkload: No window, windows of one token, or windows that are longer than the model's context.
    """
    whole = all(isinstance(number, numbers.Integral) for number in (n_windows, tokens))
    if not whole or n_windows < 1 or tokens < 2:
        raise InvalidWorkload(f"expected at least 1 window of at least 2 tokens; got {n_windows} of {tokens}")
    if context_tokens is not None and tokens > context_tokens:
        raise InvalidWorkload(f"windows of {tokens:,} tokens are beyond the model's context of {context_tokens:,}")
