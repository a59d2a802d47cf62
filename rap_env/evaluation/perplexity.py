"""Mean next-token loss and perplexity over windows of text."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Self

import torch

from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.working import working_bytes

BATCH_TOKENS = 4096  # forwarded at once
_TILE_ROWS, _TILE_WORDS = 1024, 2048  # of the float32 logits that are alive at once, in all lanes


def tokens_digest(windows: torch.Tensor) -> str:
    """SHA-256 of token windows, hexadecimal: which text a result was measured on."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + windows.cpu().numpy().tobytes()).hexdigest()


def head_rows(shape) -> int:
    """How many rows of all of a vocabulary's logits `token_losses` needs the memory of."""
    return math.ceil(_TILE_ROWS * _TILE_WORDS / max(shape.vocab_size, _TILE_WORDS))


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
    tile_rows = _TILE_ROWS // len(parts)
    losses = in_lanes(lambda part: _losses(llm, states[part], targets[part], tile_rows), parts)
    return torch.cat(losses).view(len(input_ids), -1)


def _losses(llm: SwitchableLLM, states: torch.Tensor, targets: torch.Tensor, tile_rows: int) -> torch.Tensor:
    """Losses of N states [N, H], tile by tile of the logits [N, V]: a tile stays in the CPU's cache.

    Of each tile log-softmax, the fastest reduction there is, tells the logarithm of its sum of exponentials.
    """
    size = min(tile_rows, len(states)) * min(_TILE_WORDS, llm.shape.vocab_size)
    raw = torch.empty(size, dtype=states.dtype, device=states.device)
    cast, logprobs = (torch.empty(size, device=states.device) for _ in range(2))  # used by all tiles: no page faults
    losses = []
    for rows, wanted in zip(states.split(tile_rows), targets.split(tile_rows), strict=True):
        normed, sums = llm.final_norm(rows), []
        target_logits = torch.empty(len(rows), device=rows.device)
        for first in range(0, llm.shape.vocab_size, _TILE_WORDS):
            last = min(first + _TILE_WORDS, llm.shape.vocab_size)
            raw_tile, tile, log_tile = (
                buffer[: len(rows) * (last - first)].view(len(rows), -1) for buffer in (raw, cast, logprobs)
            )
            tile.copy_(llm.head(normed, slice(first, last), out=raw_tile))
            torch.log_softmax(tile, -1, out=log_tile)
            sums.append(tile[:, 0] - log_tile[:, 0])
            inside = (wanted >= first) & (wanted < last)
            target_logits[inside] = tile[inside, wanted[inside] - first]
        losses.append((torch.stack(sums).logsumexp(0) - target_logits).double())
    return torch.cat(losses)


def window_batches(llm: SwitchableLLM, windows: torch.Tensor, batch_tokens: int = BATCH_TOKENS) -> list[torch.Tensor]:
    """Windows [N, T] on the model's device, in parts that are forwarded at once."""
    return list(windows.to(llm.device).split(max(1, batch_tokens // windows.shape[1])))


def window_means(
    llm: SwitchableLLM,
    batches: Sequence[torch.Tensor],
    masks: Sequence[PruningMask],
    measure: Callable[[torch.Tensor, int], torch.Tensor],
) -> Iterator[tuple[PruningMask, list[float]]]:
    """Mean over the tokens of each window under each of several distinct masks, whatever mask is applied.

    Args:
        llm: The model.
        batches: What `window_batches` made of the windows.
        masks: What it is judged with.
        measure: From the residual stream behind the last component [B, T, H], and the number of its batch, to a number
            for every token but one of each window [B, T - 1].
    """
    means: dict[PruningMask, list[float]] = {mask: [] for mask in masks}
    for number, batch in enumerate(batches):
        for mask, hidden in llm.run_masks(masks, *llm.open_stream(batch)):
            means[mask] += measure(hidden, number).mean(1).tolist()
            if number == len(batches) - 1:
                yield mask, means[mask]


def window_losses(
    llm: SwitchableLLM, windows: torch.Tensor, masks: Sequence[PruningMask], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[PruningMask, list[float]]]:
    """Mean loss of each window [N, T] under each of several distinct masks, whatever mask is applied."""
    batches = window_batches(llm, windows, batch_tokens)
    return window_means(llm, batches, masks, lambda hidden, number: token_losses(llm, hidden, batches[number]))


class TextEvaluator(Evaluator):
    """Judges by what is measured over fixed windows of text; the score is minus the mean over the windows.

    Args:
        windows: Tokens [N, T].
        name: What reports call the text.
    """

    kind: str  # in the identity

    def __init__(self, windows: torch.Tensor, name: str) -> None:
        self.windows, self.name = windows, name

    def part(self, members: Sequence[int]) -> Self:
        """The same judge on some of its windows."""
        return type(self)(self.windows[torch.as_tensor(members)], self.name)

    def measure(self, llm: SwitchableLLM, masks: Sequence[PruningMask]) -> Iterator[tuple[PruningMask, list[float]]]:
        """A number for each window under each mask; lower is better."""
        raise NotImplementedError

    def metrics(self, mean: float) -> dict[str, float]:
        """What is reported of the mean."""
        raise NotImplementedError

    @property
    def identity(self) -> dict:
        libraries = {library: version(library) for library in ("torch", "transformers")}
        return {"evaluator": self.kind, "windows": tokens_digest(self.windows), "versions": libraries}

    def peak_bytes(self, llm: SwitchableLLM, n_masks: int = 1) -> int:
        n_windows, tokens = self.windows.shape
        at_once = tokens * min(n_windows, max(1, BATCH_TOKENS // tokens))
        held_streams = 2 + max(1, n_masks).bit_length()  # what `run_masks` was given, what it gave last, what it holds
        return working_bytes(llm.shape, at_once, held_streams, head_rows(llm.shape))

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask]
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        started = time.perf_counter()
        for mask, values in self.measure(llm, masks):
            mean = sum(values) / len(values)
            metrics = self.metrics(mean) | {"items": len(values)}
            finished = time.perf_counter()
            yield mask, Evaluation(-mean, {self.name: metrics}, self.windows.numel(), finished - started)
            started = finished


class PerplexityEvaluator(TextEvaluator):
    """Perplexity over fixed windows; the score is minus the mean loss.

    Protocol: windows of equal length, no BOS, the first token of a window is not scored, the mean is over all scored
    tokens, logits are cast to float32.
    """

    kind = "perplexity"

    def measure(self, llm: SwitchableLLM, masks: Sequence[PruningMask]) -> Iterator[tuple[PruningMask, list[float]]]:
        return window_losses(llm, self.windows, masks)

    def metrics(self, mean: float) -> dict[str, float]:
        return {"loss": mean, "perplexity": math.exp(mean)}
