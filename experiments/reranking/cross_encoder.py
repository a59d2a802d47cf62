"""Rival: `sentence_transformers.CrossEncoder` over the same model and the same prompts."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from rap_env.llm.switchable import SwitchableLLM
from rap_env.rerank import Template
from rap_env.rerank.prompts import Prompts
from rap_env.rng import isolated_rng

_ROLE = 'messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first'


class PromptedCrossEncoder:
    """Scores documents as `CrossEncoder.rank` does, in its own batches of prompts of about the same length.

    A causal LM is a cross-encoder there whose chat template has the roles `query` and `document`, and whose score is
    the difference of two logits. The prompt becomes tokens as a whole; at its seams these are the reranker's where
    the tokenizer parts words as GPT-2's does and a document neither begins nor ends with a space.

    Args:
        llm: The model; a copy of its weights in a folder is what sentence-transformers loads.
        prompts: Which two tokens are compared.
        template: How the model is asked.
        max_document_tokens: Where a document is cut.
        batch_size: Prompts that are read at once.
        folder: For the copy.
    """

    def __init__(
        self,
        llm: SwitchableLLM,
        prompts: Prompts,
        template: Template,
        max_document_tokens: int,
        batch_size: int,
        folder: Path,
    ) -> None:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.cross_encoder.modules import LogitScore

        self._tokenizer, self._template = llm.tokenizer, template
        self._max_tokens, self._batch_size = max_document_tokens, batch_size
        llm.model.save_pretrained(folder)
        llm.tokenizer.save_pretrained(folder)
        reader = Transformer(
            str(folder),
            transformer_task="text-generation",
            model_kwargs={"dtype": llm.dtype},
            processor_kwargs={"chat_template": chat_template(template)},
        )
        modules = [reader, LogitScore(prompts.yes, prompts.no)]
        self._model = CrossEncoder(modules=modules, device="cpu", activation_fn=torch.nn.Identity())

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """logit(yes) - logit(no) of each document."""
        cut = self._cut(documents)
        with isolated_rng():
            found = self._model.rank(query, cut, batch_size=self._batch_size, show_progress_bar=False)
        scores = {each["corpus_id"]: float(each["score"]) for each in found}
        return [scores[number] for number in range(len(cut))]

    def _cut(self, documents: Sequence[str]) -> list[str]:
        """The texts of the documents up to the token that the reranker cuts them behind."""
        _front, spaces, _ending = self._template.parts("")  # which the reranker has in a document's first token
        tokens = self._tokenizer([spaces + text for text in documents], add_special_tokens=False, verbose=False)
        return [
            self._tokenizer.decode(own[: self._max_tokens], clean_up_tokenization_spaces=False)[len(spaces) :]
            if len(own) > self._max_tokens
            else text
            for own, text in zip(tokens.input_ids, documents, strict=True)
        ]


def chat_template(template: Template) -> str:
    """The template in Jinja's form, with the texts in string literals, so that Jinja strips none of their ends."""
    pieces = template.text.format(instruction=template.instruction, query="\0query\0", document="\0document\0")
    parts = []
    for place, piece in enumerate(pieces.split("\0")):
        parts.append(json.dumps(piece) if place % 2 == 0 else f"({_ROLE.format(role=piece)})")
    return "".join(f"{{{{ {part} }}}}" for part in parts)
