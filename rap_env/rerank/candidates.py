"""The documents of one request, read together layer by layer; those that leave are cut out of the stream."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rap_env.components import ATTENTION, Site
from rap_env.llm.attention import power_runs
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.packing import Packing, SharedPrefix, TokenTree
from rap_env.llm.streams import context_of
from rap_env.llm.switchable import SwitchableLLM
from rap_env.rerank.prompts import Prompt
from rap_env.rerank.states import States, StatesInFile

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
    """The residual streams of the candidates that are still read, one behind the other [N, H].

    What all candidates have in front is read once for each layer, in a stream of its own, and equal documents are read
    once, so that their scores are equal to the last bit. An attention runs over one chunk of candidates after the
    other, and an MLP, in which tokens do not see each other, over one block of rows after the other. So what they
    compute inside is bounded by the chunk, one for each lane; beside it are the states of all candidates, in memory or
    in a file.

    Chunks have a multiple of 128 rows, for which rows of others are read with them and forgotten, blocks a power of two
    times 128: on a CPU oneDNN compiles kernels for every number of rows and keeps them, so that every request, and each
    of its layers that drops somebody, would leave some more behind.

    Args:
        llm: The model.
        prompt: Of the request.
        chunk_tokens: Tokens of a chunk; a longer candidate is a chunk of its own. None for one chunk.
        folder: For a file with the states of all candidates, of which a chunk's are in memory; None: all are.

    Raises:
        RankingFailed: The file can't be used; its methods raise it too.
    """

    def __init__(self, llm: SwitchableLLM, prompt: Prompt, chunk_tokens: int | None, folder: Path | None) -> None:
        window = llm.shape.attention_window
        prefix = SharedPrefix(prompt.prefix, llm.device, window)
        endings = sorted(set(prompt.endings), key=lambda ending: (len(ending), ending))
        places = {ending: place for place, ending in enumerate(endings)}
        self._places = {number: places[ending] for number, ending in enumerate(prompt.endings)}  # in the stream
        self._llm, self._chunk_tokens = llm, chunk_tokens
        self._step = min(_STEP, chunk_tokens or _STEP)
        self._prefix, self._prefix_context, _ = llm.open_packed(prefix)
        longest, self._positions, _ = llm.open_packed([TokenTree((*prompt.prefix, *endings[-1]))])
        self._packing = Packing([TokenTree(ending) for ending in endings], llm.device, window, prefix)
        n_rows, like = self._packing.end + self._step - 1, longest[0]
        self._states = States(n_rows, like) if folder is None else StatesInFile(n_rows, like, folder)
        try:
            for rows, part in self._packing.chunks(chunk_tokens or self._packing.end):
                self._states.write(rows.start, llm.open_packed(part)[0][0])
        except BaseException:
            self.close()
            raise
        self._chunk()

    @property
    def tokens(self) -> int:
        """Tokens of the stream, with those of the prefix."""
        return self._packing.end + self._prefix.shape[1]

    def run(self, site: Site) -> None:
        """Reads on by a site."""
        self._prefix = self._llm.run([site], self._prefix, self._prefix_context)
        work = self._chunks if site.kind == ATTENTION else self._blocks
        sizes = [rows.stop - rows.start for rows, _ in work]
        lanes = cut(sizes, n_lanes(sum(sizes), self._prefix.device))
        in_lanes(lambda lane: [self._advance(site, *part) for part in work[lane]], lanes)

    def _advance(self, site: Site, rows: slice, packing: Packing | None) -> None:
        """Reads some rows on by a site: those of trees, or, without a packing, any."""
        hidden = self._states.read(rows)
        if packing is None:  # as sequences, which may go to lanes
            stream, context, n_own = hidden.unflatten(0, (-1, self._step)), {}, len(hidden)
        else:
            stream, context, n_own = hidden[None], context_of(self._positions, packing, len(hidden)), packing.end
        after = self._llm.run([site], stream, context)
        self._states.write(rows.start, after.flatten(0, 1)[:n_own])

    def scores(self, head: AnswerHead) -> np.ndarray:
        """Those of the candidates by their last tokens, in the order of their numbers [n]."""
        return head.scores(self._states.pick(self._last))[list(self._places.values())]

    def forget_all_but_the_last_tokens(self) -> None:
        """Leaves what the scores are made of; behind the last attention the other tokens have nothing to say."""
        last = self._states.pick(self._last)
        self.close()
        self._states, self._last = States(len(last) + self._step - 1, last), list(range(len(last)))
        self._states.write(0, last)
        self._chunks = []
        self._block(len(last))

    def keep(self, ids: Sequence[int]) -> None:
        """Cuts everybody else out; takes numbers of candidates, ascending."""
        before = set(self._places.values())
        kept = sorted({self._places[number] for number in ids})
        self._places = {number: kept.index(self._places[number]) for number in ids}
        if len(kept) < len(before):
            bounds = [*self._packing.starts, self._packing.end]
            self._states.keep([slice(bounds[tree], bounds[tree + 1]) for tree in kept])
            self._packing = self._packing.select(kept)
            self._chunk()

    def close(self) -> None:
        """Forgets the states."""
        self._states.close()

    def _chunk(self) -> None:
        packing, step = self._packing, self._step
        lanes = n_lanes(packing.end + -packing.end % step, self._prefix.device)
        self._chunks = packing.chunks(min(self._chunk_tokens or packing.end, math.ceil(packing.end / lanes)), step)
        self._last = [start - 1 for start in [*packing.starts[1:], packing.end]]
        self._block(packing.end)

    def _block(self, n_rows: int) -> None:
        step, n_steps = self._step, math.ceil(n_rows / self._step)
        runs = power_runs(n_steps, (self._chunk_tokens or n_steps * step) // step)
        self._blocks = [(slice(run.start * step, run.stop * step), None) for run in runs]
