"""The documents of one request, read together layer by layer; those that leave are cut out of the stream."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rap_env.llm.packing import Packing, SharedPrefix, TokenTree
from rap_env.llm.streams import chunks_of, select_trees
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import Site
from rap_env.rerank.prompts import Prompt


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
    once, so that their scores are equal to the last bit. A layer runs over one chunk
    of candidates after the other, so that what it computes inside is bounded by the chunk; beside it the buffer is in
    memory, and with it the rotary embeddings of its tokens.

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
        self._prefix, self._prefix_context, _ = llm.open_packed(prefix)
        self._hidden, self._context, _ = llm.open_packed(Packing(trees, llm.device, window, prefix))
        self._chunk()

    @property
    def tokens(self) -> int:
        """Tokens of the stream, with those of the prefix."""
        return self._hidden.shape[1] + self._prefix.shape[1]

    def run(self, sites: Sequence[Site]) -> None:
        """Reads on by some sites."""
        self._prefix = self._llm.run(sites, self._prefix, self._prefix_context)
        for hidden, context in self._chunks:
            hidden.copy_(self._llm.run(sites, hidden, context))

    def scores(self, head: AnswerHead) -> np.ndarray:
        """Those of the candidates by their last tokens, in the order of their numbers [n]."""
        starts = self._context["attention_mask"].starts
        last = [start - 1 for start in [*starts[1:], self._hidden.shape[1]]]
        return head.scores(self._hidden[0, last])[list(self._places.values())]

    def keep(self, ids: Sequence[int]) -> None:
        """Cuts everybody else out; takes numbers of candidates, ascending."""
        before = set(self._places.values())
        kept = sorted({self._places[number] for number in ids})
        self._places = {number: kept.index(self._places[number]) for number in ids}
        if len(kept) < len(before):
            self._chunks = []  # views of the buffer that goes
            self._hidden, self._context = select_trees(self._hidden, self._context, kept)
            self._chunk()

    def _chunk(self) -> None:
        self._chunks = chunks_of(self._hidden, self._context, self._chunk_tokens or self._hidden.shape[1])
