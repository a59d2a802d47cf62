"""Workloads: how many sequences of which lengths a request batch holds, and of which kind of text."""

import numbers
from dataclasses import dataclass

from rap_env.errors import InvalidWorkload


@dataclass(frozen=True)
class Workload:
    """One request batch.

    Attributes:
        batch_size: Sequences that are served together.
        prompt_tokens: Tokens of each prompt.
        generated_tokens: Tokens that each sequence may grow by.
        kind: Kind of text, such as `"code"`, where masks are evaluated by kinds; `""` where it is not told. It changes
            no bytes.

    Raises:
        InvalidWorkload: A number is not an integer, or not positive (`generated_tokens` may be zero), or the kind is no
            text.
    """

    batch_size: int
    prompt_tokens: int
    generated_tokens: int = 0
    kind: str = ""

    def __post_init__(self) -> None:
        for name, smallest in (("batch_size", 1), ("prompt_tokens", 1), ("generated_tokens", 0)):
            value = getattr(self, name)
            is_whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and value % 1 == 0
            if not is_whole or value < smallest:
                raise InvalidWorkload(f"{name} must be an integer of at least {smallest}; got {value!r}")
            object.__setattr__(self, name, int(value))
        if not isinstance(self.kind, str):
            raise InvalidWorkload(f"kind must be the name of a kind of text; got {self.kind!r}")

    @property
    def sequence_tokens(self) -> int:
        """Longest length that each sequence reaches."""
        return self.prompt_tokens + self.generated_tokens

    def cached_tokens(self, window: int | None = None) -> int:
        """Tokens over the whole batch that the KV cache holds at its largest.

        Args:
            window: Tokens that attention looks back, the own one included; None for all. transformers keeps the last
                `window - 1` of a longer sequence, but all of them for a window of 1.
        """
        tokens = self.sequence_tokens
        return self.batch_size * (tokens if window in (None, 1) else min(tokens, window - 1))

    def check_context(self, context_tokens: int) -> None:
        """Refuses sequences that are longer than a model's context.

        Raises:
            InvalidWorkload: `sequence_tokens` exceeds `context_tokens`.
        """
        if self.sequence_tokens > context_tokens:
            raise InvalidWorkload(
                f"{self} needs {self.sequence_tokens:,} tokens a sequence; the model's context is {context_tokens:,}"
            )

    def __str__(self) -> str:
        generated = f" + {self.generated_tokens}" if self.generated_tokens else ""
        of_kind = f" of {self.kind}" if self.kind else ""
        return f"{self.batch_size} x {self.prompt_tokens}{generated} tokens{of_kind}"
