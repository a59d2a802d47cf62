"""Mean next-token loss and perplexity over windows of text."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from rap_env.errors import InvalidWorkload
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.llm.held import HeldStreams
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.windows import check_windows
from rap_env.mask import PruningMask

BATCH_TOKENS = 4096  # forwarded at once
_LARGEST_LOSS = 700.0  # exp(709.8) is the largest float
_TILE_ROWS, _TILE_WORDS = 1024, 2048  # of the float32 logits that are alive at once on a CPU, in all lanes
_TILE_LOGITS = 2**25  # the same elsewhere: more rows and whole vocabularies, for each operation has to be launched


def tokens_digest(windows: torch.Tensor) -> str:
    """SHA-256 of token windows, hexadecimal: which text a result was measured on."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + windows.cpu().numpy().tobytes()).hexdigest()


def check_tokens(windows: torch.Tensor, llm: SwitchableLLM) -> None:
    """Refuses windows [N, T] that a model can't read.

    Raises:
        InvalidWorkload: They are longer than the model's context, or have tokens that it does not know.
    """
    check_windows(*windows.shape, llm.shape.context_tokens)
    if (last := int(windows.max())) >= llm.shape.vocab_size:
        raise InvalidWorkload(
            f"windows have token {last}; the model knows {llm.shape.vocab_size}: made with another tokenizer"
        )


def cut_contexts(windows: torch.Tensor, context_tokens: int, target_tokens: int) -> torch.Tensor:
    """The last tokens of windows [N, T], with a shorter context in front of them [N, context + targets].

    Raises:
        InvalidWorkload: The windows are shorter, or nothing stands in front of the targets.
    """
    if context_tokens < 1 or target_tokens < 1 or context_tokens + target_tokens > windows.shape[1]:
        raise InvalidWorkload(
            f"expected at least one token of context and of target, and at most {windows.shape[1]:,} together;"
            f" got {context_tokens:,} and {target_tokens:,}"
        )
    return windows[:, windows.shape[1] - context_tokens - target_tokens :]


def logit_tile(llm: SwitchableLLM) -> tuple[int, int]:
    """Rows and words of the float32 logits that are alive at once."""
    if llm.device.type == "cpu":
        return _TILE_ROWS, min(_TILE_WORDS, llm.shape.vocab_size)
    return max(1, _TILE_LOGITS // llm.shape.vocab_size), llm.shape.vocab_size


def token_losses(llm: SwitchableLLM, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Losses [B, T - 1] of predicting every token of each window but the first, in float64.

    In bfloat16 a mean loss near 3.7 would be rounded to steps of 0.0156 and candidates would tie, so logits are cast
    to float32.

    Args:
        llm: The model whose head is used.
        hidden: The residual stream behind the last component [B, T, H].
        input_ids: The windows' tokens [B, T].
    """
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = input_ids[:, 1:].reshape(-1)
    parts = cut([1] * len(targets), n_lanes(len(targets), hidden.device))
    rows, words = logit_tile(llm)
    tile = max(1, rows // len(parts)), words
    losses = in_lanes(lambda part: _losses(llm, states[part], targets[part], tile), parts)
    return torch.cat(losses).view(len(input_ids), -1)


def _losses(llm: SwitchableLLM, states: torch.Tensor, targets: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Losses of N states [N, H], tile by tile of the logits [N, V]: a tile stays in the CPU's cache.

    Of each tile log-softmax, the fastest reduction there is, tells the logarithm of its sum of exponentials.
    """
    tile_rows, tile_words = min(tile[0], len(states)), tile[1]
    size = tile_rows * tile_words
    raw = torch.empty(size, dtype=states.dtype, device=states.device)
    cast, logprobs = (torch.empty(size, device=states.device) for _ in range(2))  # used by all tiles: no page faults
    losses = []
    for rows, wanted in zip(states.split(tile_rows), targets.split(tile_rows), strict=True):
        normed, sums = llm.final_norm(rows), []
        target_logits = torch.empty(len(rows), device=rows.device)
        for first in range(0, llm.shape.vocab_size, tile_words):
            last = min(first + tile_words, llm.shape.vocab_size)
            raw_tile, logits, log_tile = (
                buffer[: len(rows) * (last - first)].view(len(rows), -1) for buffer in (raw, cast, logprobs)
            )
            logits.copy_(llm.head(normed, slice(first, last), out=raw_tile))
            torch.log_softmax(logits, -1, out=log_tile)
            sums.append(logits[:, 0] - log_tile[:, 0])
            column = (wanted - first).clamp(0, last - first - 1)  # boolean indices would wait for the device
            inside = (wanted >= first) & (wanted < last)
            target_logits = torch.where(inside, logits.gather(1, column[:, None])[:, 0], target_logits)
        losses.append((torch.stack(sums).logsumexp(0) - target_logits).double())
    return torch.cat(losses)


class TextEvaluator(Evaluator):
    """Evaluates by what is measured over fixed windows of text; the score is minus the mean over all scored tokens.

    Shapes: N windows of T tokens, the last S of which are scored; B windows in a batch, H hidden size.

    Args:
        windows: Tokens [N, T].
        name: What reports call the text.
        target_tokens: How many of the last tokens of each window are scored, S; None for all but the first. With the
            same last tokens behind contexts of several lengths, only the length differs (`cut_contexts`).

    Raises:
        InvalidWorkload: There is no window, none with a token to predict, or not as many tokens as are to be scored.
    """

    kind: str  # in the identity
    together = 1  # masks that are measured at once; the first of them is known with the last

    def __init__(self, windows: torch.Tensor, name: str, target_tokens: int | None = None) -> None:
        check_windows(*windows.shape)
        most = windows.shape[1] - 1
        if target_tokens is not None and not 1 <= target_tokens <= most:
            raise InvalidWorkload(f"expected 1 to {most} scored tokens in windows of {most + 1}; got {target_tokens}")
        self.windows, self.name = windows, name
        self.target_tokens = most if target_tokens is None else target_tokens
        self._held: tuple[SwitchableLLM, list[HeldStreams]] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_held": None}  # of this process's model

    def measure(self, llm: SwitchableLLM, streams: Sequence[torch.Tensor], batch: slice) -> Sequence[torch.Tensor]:
        """For each mask a number for every scored token [B, S], lower is better.

        Args:
            llm: The model whose head is used.
            streams: At most `together` residual streams behind the last site, at the last S + 1 tokens [B, S + 1, H].
            batch: Which windows these are.
        """
        raise NotImplementedError

    def metrics(self, mean: float) -> dict[str, float]:
        """What is reported of the mean."""
        raise NotImplementedError

    @property
    def identity(self) -> dict:
        identity = {"evaluator": self.kind, "name": self.name, "windows": tokens_digest(self.windows)}
        scores_all = self.target_tokens == self.windows.shape[1] - 1
        return identity if scores_all else identity | {"target_tokens": self.target_tokens}

    def tokens(self, llm: SwitchableLLM) -> int:
        return self.windows.numel()

    def first(self, fraction: float) -> "TextEvaluator":
        n_windows = math.ceil(fraction * len(self.windows))
        if n_windows == len(self.windows):
            return self
        return type(self)(self.windows[:n_windows], self.name, self.target_tokens)

    @property
    def scored(self) -> slice:
        """The places of the scored tokens, and the one in front of them, in a window."""
        return slice(self.windows.shape[1] - self.target_tokens - 1, None)

    def batches(self) -> list[slice]:
        """Windows that are forwarded at once."""
        n_windows, size = len(self.windows), max(1, BATCH_TOKENS // self.windows.shape[1])
        return [slice(first, min(first + size, n_windows)) for first in range(0, n_windows, size)]

    def open_streams(self, llm: SwitchableLLM, batch: slice) -> tuple[torch.Tensor, dict]:
        """The residual stream in front of the first site, with its context.

        Raises:
            InvalidWorkload: The windows are longer than the model's context, or have tokens that it does not know.
        """
        check_tokens(self.windows, llm)
        return llm.open_stream(self.windows[batch].to(llm.device))

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        started, sums, batches = time.perf_counter(), dict.fromkeys(masks, 0.0), self.batches()
        n_scored = len(self.windows) * self.target_tokens
        for number, batch in enumerate(batches):
            held = None if near is None else self._held_streams(llm, near)[number]
            hidden, context = self.open_streams(llm, batch) if held is None else (held.first, held.context)
            running = llm.run_masks(masks, hidden, context, held)
            while group := dict(islice(running, self.together)):
                measured = self.measure(llm, [stream[:, self.scored] for stream in group.values()], batch)
                for mask, values in zip(group, measured, strict=True):
                    sums[mask] += values.sum().item()
                if number < len(batches) - 1:
                    continue
                finished = time.perf_counter()
                seconds, started = (finished - started) / len(group), finished
                for mask in group:
                    mean = sums[mask] / n_scored
                    metrics = self.metrics(mean) | {"items": len(self.windows)}
                    yield mask, Evaluation(-mean, {self.name: metrics}, self.windows.numel(), seconds)

    def _held_streams(self, llm: SwitchableLLM, near: PruningMask) -> list[HeldStreams]:
        if self._held is None or self._held[0] is not llm:
            self._held = llm, [HeldStreams(llm, *self.open_streams(llm, batch)) for batch in self.batches()]
        for held in self._held[1]:
            held.move_to(near)
        return self._held[1]


class PerplexityEvaluator(TextEvaluator):
    """Perplexity over fixed windows; the score is minus the mean loss.

    Protocol: windows of equal length, no BOS, the first token of a window is not scored, the mean is over all scored
    tokens, logits are cast to float32.
    """

    kind = "perplexity"

    def measure(self, llm: SwitchableLLM, streams: Sequence[torch.Tensor], batch: slice) -> Sequence[torch.Tensor]:
        tokens = self.windows[batch, self.scored].to(llm.device)
        return [token_losses(llm, hidden, tokens) for hidden in streams]

    def metrics(self, mean: float) -> dict[str, float]:
        """The loss, and the perplexity unless that is beyond a float's range."""
        return {"loss": mean} | ({"perplexity": math.exp(mean)} if mean < _LARGEST_LOSS else {})
