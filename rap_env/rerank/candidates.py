"""The documents of one request, read together layer by layer; those that leave are cut out of the stream."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rap_env.llm.packing import Packing, SharedPrefix, TokenTree
from rap_env.llm.streams import chunks_of, select_trees
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import ATTENTION, Site
from rap_env.rerank.prompts import Prompt

_STEP = 128  # rows; with fewer, a product on a CPU costs more a row


class AnswerHead:
    """The rows of a model's head for two answers.

    Args:
        llm: The model.
        yes: Token of the one answer.
        no: Token of the other.
    """

    def __init__(self, llm: SwitchableLLM, yes: int, no: int) -> None:
        self._llm, head = llm, llm.model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            rows = head.weight.detach()[[yes, no]]
        else:  # a quantised one
            rows = torch.cat([head.matrix(slice(token, token + 1)).T.clone() for token in (yes, no)])
        self._rows = rows.float()  # [2, H]

    def scores(self, states: torch.Tensor) -> np.ndarray:
        """logit(yes) - logit(no) in float32, whatever the model's type, [n, H] -> [n].

        Logits in bfloat16 have steps of 1/16 and more, so that many scores would be equal.
        """
        logits = self._llm.final_norm(states).float() @ self._rows.T
        return (logits[:, 0] - logits[:, 1]).double().cpu().numpy()


class Candidates:
    """The residual streams of the candidates that are still read, in one buffer [1, N, H].

    What all candidates have in front is read once for each layer, in a stream of its own, and equal documents are read
    once, so that their scores are equal to the last bit. An attention runs over one chunk of candidates after the
    other, and an MLP, in which tokens do not see each other, over one block of rows after the other. So what they
    compute inside is bounded by the chunk; beside it the buffer is in memory, and with it the rotary embeddings of its
    tokens.

    Chunks and blocks have a multiple of 128 rows, for which rows of others are read with them and forgotten: on a CPU
    oneDNN compiles kernels for every number of rows and keeps them (0.6 MB for a matrix of SmolLM2), so that every
    request, and each of its layers that drops somebody, would leave some more behind.

    Args:
        llm: The model.
        prompt: Of the request.
        chunk_tokens: Tokens of a chunk; a longer candidate is a chunk of its own. None for one chunk.
    """

    def __init__(self, llm: SwitchableLLM, prompt: Prompt, chunk_tokens: int | None) -> None:
        window = llm.shape.attention_window
        prefix = SharedPrefix(prompt.prefix, llm.device, window)
        endings = sorted(set(prompt.endings), key=lambda ending: (len(ending), ending))
        places = {ending: place for place, ending in enumerate(endings)}
        self._places = {number: places[ending] for number, ending in enumerate(prompt.endings)}  # in the stream
        trees = [TokenTree(ending) for ending in endings]
        self._llm, self._chunk_tokens = llm, chunk_tokens
        self._step = min(_STEP, chunk_tokens or _STEP)
        self._prefix, self._prefix_context, _ = llm.open_packed(prefix)
        packing = Packing(trees, llm.device, window, prefix, spare=self._step - 1)
        self._hidden, self._context, _ = llm.open_packed(packing)
        self._chunk()

    @property
    def tokens(self) -> int:
        """Tokens of the stream, with those of the prefix."""
        return self._context["attention_mask"].end + self._prefix.shape[1]

    def run(self, site: Site) -> None:
        """Reads on by a site."""
        self._prefix = self._llm.run([site], self._prefix, self._prefix_context)
        for hidden, context in self._chunks if site.kind == ATTENTION else self._blocks:
            own = context["attention_mask"].end if context else len(hidden.flatten(0, 1))
            after = self._llm.run([site], hidden, context).flatten(0, 1)
            hidden.flatten(0, 1)[:own].copy_(after[:own])

    def scores(self, head: AnswerHead) -> np.ndarray:
        """Those of the candidates by their last tokens, in the order of their numbers [n]."""
        return head.scores(self._hidden[0, self._last])[list(self._places.values())]

    def forget_all_but_the_last_tokens(self) -> None:
        """Leaves what the scores are made of; behind the last attention the other tokens have nothing to say."""
        n = len(self._last)
        self._hidden = self._hidden[:, [*self._last, *self._last[-1:] * (-n % self._step)]]
        self._chunks, self._last = [], list(range(n))
        self._block(n)

    def keep(self, ids: Sequence[int]) -> None:
        """Cuts everybody else out; takes numbers of candidates, ascending."""
        before = set(self._places.values())
        kept = sorted({self._places[number] for number in ids})
        self._places = {number: kept.index(self._places[number]) for number in ids}
        if len(kept) < len(before):
            self._chunks = self._blocks = []  # views of the buffer that goes
            self._hidden, self._context = select_trees(self._hidden, self._context, kept)
            self._chunk()

    def _chunk(self) -> None:
        end, step = self._context["attention_mask"].end, self._step
        self._chunks = chunks_of(self._hidden, self._context, self._chunk_tokens or end + step, step)
        self._last = [start - 1 for start in [*self._context["attention_mask"].starts[1:], end]]
        self._block(end)

    def _block(self, n_rows: int) -> None:
        step = self._step  # of rows, as sequences, which may go to lanes
        rows = self._hidden[0, : n_rows + -n_rows % step].unflatten(0, (-1, step))
        self._blocks = [(block, {}) for block in rows.split((self._chunk_tokens or len(rows) * step) // step)]
