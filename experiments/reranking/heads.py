"""Rival without training: a few attention heads whose attention from the query says which documents answer it.

Contrastive retrieval heads (CoRe, arXiv 2510.02219). All documents stand in one prompt with the query behind them, so
that in a causal model its tokens see every document.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from rap_env.errors import InvalidConfig
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.widened import linears_widened
from rap_env.rng import isolated_rng

_TEMPERATURE = 0.001  # of the contrastive score; what one document gets of all attention is a small number
_OPENING = "Here are some passages:\n\n"
_ASKING = "\nWhich of these passages answer the query?\nQuery: "
_NO_QUERY = "N/A"  # what attention has without a query is taken off, as in in-context re-ranking (arXiv 2410.02642)


class Example(NamedTuple):
    """A query that heads are chosen on.

    Attributes:
        query: Its text.
        documents: The candidates [n].
        relevant: Which of them answer it [n].
    """

    query: str
    documents: Sequence[str]
    relevant: Sequence[bool]


class AttentionHeads:
    """Scores documents by attention from the query's tokens, summed over the heads that tell documents apart best.

    Args:
        llm: The model, unmasked.
        max_document_tokens: Where a document is cut; earlier if all of them would not fit into the model's context.
        examples: What heads are chosen on; those without relevant or without other documents say nothing.
        n_heads: How many are chosen.

    Attributes:
        heads: The chosen ones, as (layer, head), the best first.

    Raises:
        InvalidConfig: No example says anything.
    """

    def __init__(self, llm: SwitchableLLM, max_document_tokens: int, examples: Sequence[Example], n_heads: int) -> None:
        self._llm, self._max_tokens = llm, max_document_tokens
        useful = [each for each in examples if 0 < sum(each.relevant) < len(each.relevant)]
        if not useful:
            raise InvalidConfig("expected a calibration query with relevant documents among its candidates; got none")
        scores = [contrastive_scores(self._by_head(each.query, each.documents), each.relevant) for each in useful]
        mean = np.mean(scores, 0)  # [layers, heads]
        best = np.argsort(-mean, axis=None, kind="stable")[:n_heads]
        self.heads = [tuple(map(int, np.unravel_index(place, mean.shape))) for place in best]

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """A score of each document."""
        by_head = self._by_head(query, documents)
        return sum(by_head[head] for head in self.heads).tolist()

    @torch.inference_mode()
    def _by_head(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Attention that each document gets from the query beyond what it gets without one [layers, heads, n]."""
        asked, unasked = (self._tokens(f"{_ASKING}{text}") for text in (query, _NO_QUERY))
        opening = self._tokens(_OPENING)
        room = self._llm.shape.context_tokens - len(opening) - max(len(asked), len(unasked))
        cut = min(self._max_tokens, room // len(documents))
        prompt, spans = list(opening), []
        for text in documents:
            own = self._tokens(f"{text}\n")[: max(1, cut)]
            spans.append(slice(len(prompt), len(prompt) + len(own)))
            prompt += own
        model = self._llm.model
        with isolated_rng(), linears_widened(self._llm):
            cache = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).past_key_values
            implementation = model.config._attn_implementation
            model.set_attn_implementation("eager")  # others don't return what they attend to
            try:
                with_query, without = self._attention([asked, unasked], cache, len(prompt))
            finally:
                model.set_attn_implementation(implementation)
        return np.stack([(with_query - without)[:, :, span].sum(2) for span in spans], 2)

    def _attention(self, endings: Sequence[list[int]], cache, n_tokens: int) -> Iterator[np.ndarray]:
        """Mean attention of each ending's tokens to every token of the prompt [layers, heads, T]."""
        for ending in endings:
            output = self._llm.model(
                torch.tensor([ending]), past_key_values=cache, output_attentions=True, logits_to_keep=1
            )
            yield np.stack([each[0, :, :, :n_tokens].float().mean(1).numpy() for each in output.attentions])
            cache.crop(-len(ending))

    def _tokens(self, text: str) -> list[int]:
        return self._llm.tokenizer(text, add_special_tokens=False).input_ids


def contrastive_scores(attention: np.ndarray, relevant: Sequence[bool]) -> np.ndarray:
    """How surely each head prefers relevant documents to the others.

    The mean over relevant documents of exp(a / t) / (exp(a / t) + the sum of exp(b / t) over the others).

    Args:
        attention: Of each document, by head [layers, heads, n].
        relevant: Which documents are [n].

    Returns:
        Scores from 0 to 1 [layers, heads].
    """
    scaled = attention / _TEMPERATURE
    chosen = np.asarray(relevant, bool)
    others = np.logaddexp.reduce(scaled[..., ~chosen], axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(others - scaled[..., chosen]))).mean(-1)
