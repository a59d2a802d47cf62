"""Log-likelihoods of continuations, for as few forwarded tokens and logits as the requests allow."""

from collections.abc import Iterator, Sequence

import torch

from rap_env.llm.switchable import SwitchableLLM

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a context and of its continuation
_HEAD_ROWS = 128  # rows of float32 logits that are alive at once; more of them fall out of the CPU cache


def forwarded_inputs(pairs: Sequence[Pair]) -> dict[tuple[int, ...], list[int]]:
    """Distinct inputs that the pairs need, with the pairs that each one answers.

    The last token of a continuation is only predicted, never read. Choices of one token therefore share one input,
    their context.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        inputs.setdefault((context + continuation)[:-1], []).append(index)
    return inputs


def score_continuations(
    llm: SwitchableLLM, pairs: Sequence[Pair], batch_tokens: int = 4096
) -> list[tuple[float, bool]]:
    """Scores continuations under the mask that is applied.

    Inputs are padded on the right, where causal attention keeps the padding from everything that is read, so no
    attention mask is needed. Logits are computed for the predicted positions only and normalised in float32.

    Args:
        llm: The model.
        pairs: Tokens of contexts (at least one) and continuations (at least one).
        batch_tokens: Tokens that are forwarded at once, padding included; bounds the activations' memory.

    Returns:
        For each pair the log-probability of its continuation, and whether greedy decoding would produce it.
    """
    totals, all_greedy = [0.0] * len(pairs), [True] * len(pairs)
    inputs = forwarded_inputs(pairs)
    with torch.inference_mode():
        for batch in _batches(sorted(inputs, key=len, reverse=True), batch_tokens):
            hidden = _forward(llm, batch)
            rows, positions, targets, owners = [], [], [], []
            for row, tokens in enumerate(batch):
                for index in inputs[tokens]:
                    continuation = pairs[index][1]
                    rows += [row] * len(continuation)
                    positions += range(len(tokens) - len(continuation), len(tokens))
                    targets += continuation
                    owners += [index] * len(continuation)
            logprobs, greedy = _token_logprobs(llm, hidden[rows, positions], torch.tensor(targets, device=llm.device))
            for index, logprob, is_greedy in zip(owners, logprobs, greedy, strict=True):
                totals[index] += logprob
                all_greedy[index] &= is_greedy
    return list(zip(totals, all_greedy, strict=True))


def _batches(inputs: list[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Cuts inputs, longest first, into batches of at most `batch_tokens` padded tokens (at least one input each)."""
    start = 0
    while start < len(inputs):
        size = max(1, batch_tokens // len(inputs[start]))
        yield inputs[start : start + size]
        start += size


def _forward(llm: SwitchableLLM, batch: list[tuple[int, ...]]) -> torch.Tensor:
    longest = len(batch[0])
    padded = torch.tensor([tokens + (0,) * (longest - len(tokens)) for tokens in batch], device=llm.device)
    hidden, context = llm.open_stream(padded)
    return llm.run(llm.mask.kept, hidden, context)


def _token_logprobs(llm: SwitchableLLM, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[list[float], list[bool]]:
    logprobs, greedy = [], []
    for start in range(0, len(targets), _HEAD_ROWS):
        chunk = targets[start : start + _HEAD_ROWS, None]
        logits = llm.logits(hidden[start : start + _HEAD_ROWS]).float()
        chosen = logits.gather(1, chunk)[:, 0]
        logprobs += (chosen - logits.logsumexp(-1)).tolist()
        greedy += (chosen == logits.amax(-1)).tolist()
    return logprobs, greedy
