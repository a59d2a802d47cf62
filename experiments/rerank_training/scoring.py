"""Scores of a query's documents: by the answer, and by how likely the query is after each of them."""

from collections.abc import Sequence

import torch
from torch import nn

from rap_env.rerank.prompts import Prompts, Template

_BATCH = 10  # documents that are scored together where nothing is learned


class ListScorer:
    """Scores documents; gradients reach whatever in the model takes part in learning.

    What all documents have in front is read once, and its keys and values serve all of them.

    Args:
        model: A causal LM of transformers, with or without adapters in its layers.
        tokenizer: The model's.
        template: How it is asked; for `likelihoods` the query stands behind the document, once.
        max_document_tokens: Where documents are cut; it may be changed.

    Attributes:
        tokens: That were read so far, without padding.
    """

    def __init__(self, model: nn.Module, tokenizer, template: Template, max_document_tokens: int) -> None:
        self._decoder, self._tokenizer, self._template = model.base_model, tokenizer, template
        self._n_layers = model.config.num_hidden_layers
        self._context_tokens = model.config.max_position_embeddings
        self.max_document_tokens = max_document_tokens
        self._head = model.get_output_embeddings().weight.detach()
        prompts = self._prompts()
        self._direction = self._head[prompts.yes].float() - self._head[prompts.no].float()
        self.tokens = 0

    def scores(self, query: str, documents: Sequence[str]) -> torch.Tensor:
        """logit(yes) - logit(no) of the documents [N], float32."""
        return self.layer_scores(query, documents, [self._n_layers])[0]

    def layer_scores(self, query: str, documents: Sequence[str], n_layers: Sequence[int]) -> torch.Tensor:
        """The same by the model's own head after so many layers [L, N]."""
        states, lengths, _tokens = self._read(query, documents)
        rows = torch.arange(len(lengths), device=lengths.device)
        last = {n: states[n][rows, lengths - 1] for n in n_layers}
        # Behind the last layer the model has done it.
        normed = [state if n == self._n_layers else self._decoder.norm(state) for n, state in last.items()]
        return torch.stack(normed).float() @ self._direction

    @torch.no_grad()
    def likelihoods(self, query: str, documents: Sequence[str]) -> torch.Tensor:
        """Mean log-likelihood of the query's tokens after each document [N], float32, in nats (arXiv 2204.07496)."""
        _front, ending = self._template.text.split("{document}")
        before, behind = ending.split("{query}")
        behind = behind.format(instruction=self._template.instruction)
        n_before, n_all, n_behind = (self._n_tokens(text) for text in (before, before + query + behind, behind))
        states, lengths, tokens = self._read(query, documents)
        places = lengths[:, None] - n_all + torch.arange(n_before, n_all - n_behind, device=lengths.device)
        rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        logits = (states[-1][rows, places - 1] @ self._head.T).float()
        return -nn.functional.cross_entropy(logits.transpose(1, 2), tokens[rows, places], reduction="none").mean(1)

    @torch.no_grad()
    def rank(self, query: str, documents: Sequence[str], by_likelihood: bool = False) -> list[float]:
        """The documents' scores, in their order; documents of about the same length are read together."""
        scores = [0.0] * len(documents)
        order = sorted(range(len(documents)), key=lambda index: len(documents[index]))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            score = self.likelihoods if by_likelihood else self.scores
            for index, found in zip(batch, score(query, [documents[index] for index in batch]).tolist(), strict=True):
                scores[index] = found
        return scores

    def _prompts(self) -> Prompts:
        return Prompts(self._tokenizer, self._template, self.max_document_tokens, self._context_tokens)

    def _n_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _read(
        self, query: str, documents: Sequence[str]
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        """What each document has of its own: states after 0, 1, ... layers [N, T, H], their number [N], its tokens."""
        device, prompt = self._direction.device, self._prompts().of(query, documents)
        prefix, ends = prompt.prefix, prompt.endings
        lengths = torch.tensor([len(end) for end in ends], device=device)
        longest = int(lengths.max())
        tokens = torch.tensor([[*end, *[0] * (longest - len(end))] for end in ends], device=device)
        visible = torch.arange(longest, device=device) < lengths[:, None]
        visible = torch.cat([visible.new_ones(len(ends), len(prefix)), visible], 1)
        cache = self._decoder(torch.tensor([prefix], device=device), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ends))
        states = self._decoder(
            tokens, attention_mask=visible.long(), past_key_values=cache, use_cache=True, output_hidden_states=True
        ).hidden_states
        self.tokens += len(prefix) + int(lengths.sum())
        return states, lengths, tokens
