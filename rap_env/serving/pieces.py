"""Text from tokens as they come: whole characters only, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what decoders put in place of bytes that are no character


class GrowingText:
    """The text of a sequence, handed out as soon as it can't change any more.

    A character may be spread over several tokens, and a stop string too. What may still become part of either is held
    back until the next tokens decide.

    Args:
        decode: Text of some tokens.
        stops: Strings that end the text; they are not part of it.

    Attributes:
        stopped: Whether one came.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops, self.stopped = decode, tuple(stops), False
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens from the first on are decoded again, text up to the second is out
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Takes the next token; returns what can be shown now."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        # The tokens of the last text stay as context: a decoder may treat the beginning of a text differently.
        self._context, self._read = self._read, len(self._tokens)
        return self._show(new)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        shown = self._show(self._new_text())
        held, self._held, self._read = self._held, "", len(self._tokens)
        return shown + held

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _show(self, new: str) -> str:
        text = self._held + new
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
