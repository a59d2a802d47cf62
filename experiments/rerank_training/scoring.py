"""Scores of a query's documents: the query is read once, and its keys and values serve all of them."""

from collections.abc import Sequence

import torch
from torch import nn

from experiments.rerank_training.template import answer_tokens, document_tokens, query_tokens

_BATCH = 10  # documents that are scored together where nothing is learned


class ListScorer:
    """Scores documents by logit(yes) - logit(no); gradients reach whatever in the model takes part in learning.

    Args:
        model: A causal LM of transformers, with or without adapters in its layers.
        tokenizer: The model's.
        max_document_tokens: Where documents are cut; it may be changed.

    Attributes:
        tokens: That were read so far, without padding.
    """

    def __init__(self, model: nn.Module, tokenizer, max_document_tokens: int) -> None:
        self._decoder, self._tokenizer = model.base_model, tokenizer
        self.max_document_tokens = max_document_tokens
        yes, no = answer_tokens(tokenizer)
        rows = model.get_output_embeddings().weight.detach()
        self._direction = rows[yes].float() - rows[no].float()
        self.tokens = 0

    def scores(self, query: str, documents: Sequence[str]) -> torch.Tensor:
        """The documents' scores [N], float32."""
        device = self._direction.device
        prefix = query_tokens(self._tokenizer, query)
        ends = [document_tokens(self._tokenizer, text, self.max_document_tokens) for text in documents]
        lengths = torch.tensor([len(end) for end in ends], device=device)
        longest = int(lengths.max())
        tokens = torch.tensor([end + [0] * (longest - len(end)) for end in ends], device=device)
        visible = torch.arange(longest, device=device) < lengths[:, None]
        visible = torch.cat([visible.new_ones(len(ends), len(prefix)), visible], 1)
        cache = self._decoder(torch.tensor([prefix], device=device), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ends))
        hidden = self._decoder(
            tokens, attention_mask=visible.long(), past_key_values=cache, use_cache=True
        ).last_hidden_state
        self.tokens += len(prefix) + int(lengths.sum())
        return hidden[torch.arange(len(ends)), lengths - 1].float() @ self._direction

    @torch.no_grad()
    def rank(self, query: str, documents: Sequence[str]) -> list[float]:
        """The documents' scores, in their order; documents of about the same length are read together."""
        scores = [0.0] * len(documents)
        order = sorted(range(len(documents)), key=lambda index: len(documents[index]))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            found = self.scores(query, [documents[index] for index in batch])
            for index, score in zip(batch, found.tolist(), strict=True):
                scores[index] = score
        return scores
