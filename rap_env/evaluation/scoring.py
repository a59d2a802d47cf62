"""Log-likelihoods of continuations, for as few forwarded tokens and logits as the requests allow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rap_env.errors import EvaluationFailed
from rap_env.evaluation.evaluator import check_finite
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.packing import TokenTree
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a context and of its continuation
Score = tuple[float, bool]  # log-probability of a continuation, and whether greedy decoding would produce it
_HEAD_ROWS = 128  # rows of float32 logits that are alive at once in all lanes; more fall out of the CPU's cache
# Branches' tokens for each token of their context. Beyond it another copy of the context costs less than attention
# over everything that the branches may not see.
_BRANCHING = 8


def fit_to_context(context: Sequence[int], continuation: Sequence[int], context_tokens: int) -> Pair:
    """A pair whose context is cut from the left until the model takes it: its last token is predicted, never read.

    Args:
        context: Tokens in front of the continuation.
        continuation: Tokens to score.
        context_tokens: Longest sequence that the model takes.

    Raises:
        EvaluationFailed: Nothing stands in front of the continuation to predict it from, it has no tokens, or more than
            the model takes.
    """
    if not context:
        raise EvaluationFailed("its context has no tokens, so there is nothing to predict the continuation from")
    if not continuation:
        raise EvaluationFailed("its continuation has no tokens; a token may span its join with the context")
    if len(continuation) > context_tokens:
        raise EvaluationFailed(
            f"its continuation has {len(continuation)} tokens; the model takes at most {context_tokens}"
        )
    overflow = max(0, len(context) + len(continuation) - 1 - context_tokens)
    return tuple(context[overflow:]), tuple(continuation)


@dataclass
class _Request:
    """A context, and by branch the pairs whose continuation is the branch and one token more: without any branch those
    of a single token, which is predicted from the context alone."""

    context: tuple[int, ...]
    owners: dict[tuple[int, ...], list[int]]

    @property
    def tree(self) -> TokenTree:
        return TokenTree(self.context, tuple(branch for branch in self.owners if branch))


class ScoringPlan:
    """How a list of pairs is forwarded: which tokens, in which batches, and where each answer is read.

    The choices of an item share their context; the last token of a continuation is only predicted, never read; choices
    that begin alike share the logits they are predicted from. Trees are packed by length, without padding.

    Args:
        pairs: Tokens of contexts (at least one) and continuations (at least one).
        batch_tokens: Tokens that are forwarded at once; bounds the activations' memory. A longer tree goes alone.
    """

    def __init__(self, pairs: Sequence[Pair], batch_tokens: int = 4096) -> None:
        assert all(context and continuation for context, continuation in pairs), "see fit_to_context"
        self.pairs = pairs
        requests = sorted(_requests(pairs, batch_tokens), key=lambda request: len(request.tree))
        self._batches = _cut(requests, batch_tokens)

    @property
    def tokens(self) -> int:
        """Tokens that are forwarded."""
        return sum(len(request.tree) for batch in self._batches for request in batch)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @property
    def head_rows(self) -> int:
        """Positions whose logits are computed."""
        return sum(1 + sum(map(len, request.owners)) for batch in self._batches for request in batch)

    def run(self, llm: SwitchableLLM, masks: Sequence[PruningMask]) -> Iterator[tuple[PruningMask, list[Score]]]:
        """Scores all pairs under each of several distinct masks, whatever mask is applied.

        Raises:
            EvaluationFailed: A token's log-likelihood is not a finite number.

        Yields:
            Each mask with the pairs' scores, as soon as its last batch is done.
        """
        totals = {mask: [0.0] * len(self.pairs) for mask in masks}
        greedy = {mask: [True] * len(self.pairs) for mask in masks}
        for index, batch in enumerate(self._batches):
            hidden, context, packing = llm.open_packed([request.tree for request in batch])
            reading = _Reading(batch, packing.starts, self.pairs, llm.device)
            for mask, stream in llm.run_masks(masks, hidden, context):
                for pair, logprob, is_greedy in reading.read(llm, stream[0]):
                    totals[mask][pair] += logprob
                    greedy[mask][pair] &= is_greedy
                if index == len(self._batches) - 1:
                    yield mask, list(zip(totals[mask], greedy[mask], strict=True))


def _requests(pairs: Sequence[Pair], batch_tokens: int) -> Iterator[_Request]:
    branches: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        branches.setdefault(context, {}).setdefault(continuation[:-1], []).append(index)
    for context, owners_of in branches.items():
        room = min(_BRANCHING * len(context), batch_tokens - len(context))
        request, left = _Request(context, {}), room
        for branch, owners in owners_of.items():
            if branch and left < room and len(branch) > left:
                yield request
                request, left = _Request(context, {}), room
            request.owners[branch] = owners
            left -= len(branch)
        yield request


def _cut(requests: list[_Request], batch_tokens: int) -> list[list[_Request]]:
    """Cuts requests into batches of at most `batch_tokens` tokens (at least one request each)."""
    batches, tokens = [], 0
    for request in requests:
        if not batches or tokens + len(request.tree) > batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(request)
        tokens += len(request.tree)
    return batches


class _Reading:
    """Which positions of a packed stream predict which tokens of which pairs.

    R rows are read; each of the Q predicted tokens is looked up in the logits of one of them.
    """

    def __init__(self, batch: list[_Request], starts: list[int], pairs: Sequence[Pair], device: torch.device) -> None:
        positions, queries = [], []
        for request, start in zip(batch, starts, strict=True):
            first_row, end = len(positions), start + len(request.context)
            positions.append(end - 1)
            for branch, owners in request.owners.items():
                rows = [first_row, *range(len(positions), len(positions) + len(branch))]
                positions += range(end, end + len(branch))
                end += len(branch)
                queries += [
                    (row, token, pair) for pair in owners for row, token in zip(rows, pairs[pair][1], strict=True)
                ]
        queries.sort()  # by row, so that each chunk of rows answers a run of them
        self._positions = torch.tensor(positions, device=device)
        self._rows = torch.tensor([row for row, _token, _pair in queries], device=device)
        self._tokens = torch.tensor([token for _row, token, _pair in queries], device=device)
        self._pairs = [pair for _row, _token, pair in queries]

    def read(self, llm: SwitchableLLM, stream: torch.Tensor) -> Iterator[tuple[int, float, bool]]:
        """Pair, log-probability and greediness of each predicted token, from the final stream [N, H]."""
        states = stream[self._positions]
        logprobs = torch.empty(len(self._rows), device=states.device)
        greedy = torch.zeros(len(self._rows), dtype=torch.bool, device=states.device)
        lanes = n_lanes(len(states), states.device)
        chunk_rows = max(1, _HEAD_ROWS // lanes)
        starts = torch.arange(0, len(states) + chunk_rows, chunk_rows)
        cuts = torch.searchsorted(self._rows, starts.to(states.device)).tolist()

        def read_rows(chunks: slice) -> None:
            for chunk in range(chunks.start, chunks.stop):
                begin, first, last = int(starts[chunk]), cuts[chunk], cuts[chunk + 1]
                logits = llm.logits(states[begin : int(starts[chunk + 1])])
                rows, tokens = self._rows[first:last] - begin, self._tokens[first:last]
                # lm-eval's own operation: over 49,152 words it rounds ten times as much as all layers do.
                logprobs[first:last] = logits.log_softmax(-1, dtype=torch.float32)[rows, tokens]
                largest = (logits[rows, tokens] == logits.amax(-1)[rows]).nonzero()[:, 0]
                first_largest = logits[rows[largest]].max(-1).indices  # decoding takes the first of equal ones
                greedy[first + largest] = first_largest == tokens[largest]

        in_lanes(read_rows, cut([1] * (len(starts) - 1), lanes))
        found = logprobs.tolist()
        check_finite("log-likelihood of a token", found, llm)  # an accuracy would be finite also if all of them are NaN
        return zip(self._pairs, found, greedy.tolist(), strict=True)
