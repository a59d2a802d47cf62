"""Mean next-token loss and perplexity over windows of text."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import torch
from torch.nn import functional

from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.working import working_bytes

_BATCH_TOKENS = 4096  # forwarded at once
_HEAD_ROWS = 128  # rows of float32 logits that are alive at once; more of them fall out of the CPU cache


def tokens_digest(windows: torch.Tensor) -> str:
    """SHA-256 of token windows, hexadecimal: which text a result was measured on."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + windows.cpu().numpy().tobytes()).hexdigest()


def stream_loss(llm: SwitchableLLM, hidden: torch.Tensor, input_ids: torch.Tensor) -> float:
    """Mean loss of predicting every token of each window but the first.

    In bfloat16 a mean loss near 3.7 would be rounded to steps of 0.0156 and candidates would tie, so logits are cast
    to float32 before the loss and summed in float64.

    Args:
        llm: The model whose head is used.
        hidden: The residual stream behind the last component [B, T, H].
        input_ids: The windows' tokens [B, T].
    """
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = input_ids[:, 1:].reshape(-1)
    total = 0.0
    for start in range(0, len(targets), _HEAD_ROWS):
        logits = llm.logits(states[start : start + _HEAD_ROWS]).float()
        total += functional.cross_entropy(logits, targets[start : start + _HEAD_ROWS], reduction="sum").item()
    return total / len(targets)


def window_losses(
    llm: SwitchableLLM, windows: torch.Tensor, masks: Sequence[PruningMask], batch_tokens: int = _BATCH_TOKENS
) -> Iterator[tuple[PruningMask, list[float]]]:
    """Mean loss of each window [N, T] under each of several distinct masks, whatever mask is applied."""
    losses: dict[PruningMask, list[float]] = {mask: [] for mask in masks}
    for batch in windows.to(llm.device).split(max(1, batch_tokens // windows.shape[1])):
        for mask, hidden in llm.run_masks(masks, *llm.open_stream(batch)):
            losses[mask] += [stream_loss(llm, hidden[row, None], batch[row, None]) for row in range(len(batch))]
            if len(losses[mask]) == len(windows):
                yield mask, losses[mask]


class PerplexityEvaluator(Evaluator):
    """Perplexity over fixed windows; the score is minus the mean loss.

    Protocol: windows of equal length, no BOS, the first token of a window is not scored, the mean is over all scored
    tokens, logits are cast to float32.

    Args:
        windows: Tokens [N, T].
        name: What reports call the text.
    """

    def __init__(self, windows: torch.Tensor, name: str) -> None:
        self._windows, self._name = windows, name

    @property
    def identity(self) -> dict:
        libraries = {library: version(library) for library in ("torch", "transformers")}
        return {"evaluator": "perplexity", "windows": tokens_digest(self._windows), "versions": libraries}

    def peak_bytes(self, llm: SwitchableLLM, n_masks: int = 1) -> int:
        n_windows, tokens = self._windows.shape
        at_once = tokens * min(n_windows, max(1, _BATCH_TOKENS // tokens))
        return working_bytes(llm.shape, at_once, 1 + max(1, n_masks).bit_length(), _HEAD_ROWS)

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask]
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        started = time.perf_counter()
        for mask, losses in window_losses(llm, self._windows, masks):
            loss = sum(losses) / len(losses)
            metrics = {"loss": loss, "perplexity": math.exp(loss), "items": len(losses)}
            finished = time.perf_counter()
            yield mask, Evaluation(-loss, {self._name: metrics}, self._windows.numel(), finished - started)
            started = finished
