"""Encoder cross-encoders as rerankers: BERT and its relatives read query and document together, and give one score."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rap_env.errors import RankingFailed, UnsupportedArchitecture
from rap_env.llm.encoders import load_encoder
from rap_env.llm.widened import linears_widened
from rap_env.rerank.layerwise import LayerwiseReranker, check_request
from rap_env.rerank.selection import Decider
from rap_env.rerank.similarity import SimilarityExit, embedding_similarities

_FAMILIES = ("bert", "roberta", "xlm-roberta")


class EncoderReranker(LayerwiseReranker):
    """Ranks documents by the score of an encoder with a classification head of one output.

    Documents are read in padded batches of about the same length, layer by layer over all batches. With a decider, what
    the head makes of the first token after each layer decides who is read on, as in `Reranker`.

    Args:
        model: `BertForSequenceClassification` or its counterpart of RoBERTa and XLM-R, which is what
            `AutoModelForSequenceClassification` makes of BGE's and MS MARCO's rerankers.
        tokenizer: Of the model.
        decider: After which layer who leaves, or who is not read at all; None reads every document with all layers.
        max_tokens: Where a query and its document together are cut, at the document's end.
        batch_size: Documents of a batch.

    Raises:
        UnsupportedArchitecture: The model is of another family, or has several outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        decider: Decider | SimilarityExit | None = None,
        max_tokens: int = 512,
        batch_size: int = 16,
    ) -> None:
        super().__init__(decider)
        family = model.config.model_type
        if family not in _FAMILIES or model.config.num_labels != 1:
            raise UnsupportedArchitecture(
                f"expected an encoder of {', '.join(_FAMILIES)} with 1 output; got {family} with"
                f" {model.config.num_labels}"
            )
        self._model, self._tokenizer = model, tokenizer
        self._max_tokens, self._batch_size = max_tokens, batch_size

    @classmethod
    def load(cls, name: str, dtype: str = "float32", device: str = "cpu", **options: Any) -> "EncoderReranker":
        """Loads a model and makes it a reranker.

        Args:
            name: A local folder, or a hub name.
            dtype: As in `load_encoder`.
            device: Likewise.
            **options: As in `EncoderReranker`.

        Raises what `load_encoder` and `EncoderReranker` raise.
        """
        return cls(*load_encoder(name, dtype, device), **options)

    @property
    def n_layers(self) -> int:
        return len(self._model.base_model.encoder.layer)

    @torch.inference_mode()
    def similarities(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Cosine of each document's mean word embedding with the query's [n]; -1 where one has no tokens.

        Raises:
            RankingFailed: As `rank`.
        """
        check_request(query, documents, None)
        tokens = self._tokenizer([query, *documents], add_special_tokens=False, verbose=False).input_ids
        cut = [own[: self._max_tokens] for own in tokens]
        return embedding_similarities(self._model.get_input_embeddings(), cut, self._model.device)

    def _read(self, query: str, documents: Sequence[str]) -> Iterator[tuple[int, "_Batches"]]:
        batches = _Batches(self._batches(query, documents))
        for number, layer in enumerate(self._model.base_model.encoder.layer):
            batches.run(layer)
            yield number, batches

    def _scores(self, reading: "_Batches") -> np.ndarray:
        return reading.scores(self._head)

    def _batches(self, query: str, documents: Sequence[str]) -> Iterator["_Batch"]:
        query_tokens, limit = len(self._tokenizer([query], [""]).input_ids[0]), self._max_tokens
        if query_tokens >= limit:
            raise RankingFailed(f"the query has {query_tokens} tokens of {limit}: there is no room for a document")
        pairs = self._tokenizer(
            [query] * len(documents),
            list(documents),
            truncation="only_second",
            max_length=limit,
        )
        order = sorted(range(len(documents)), key=lambda number: len(pairs["input_ids"][number]))
        for start in range(0, len(order), self._batch_size):
            ids = order[start : start + self._batch_size]
            rows = {key: [values[number] for number in ids] for key, values in pairs.items()}
            padded = self._tokenizer.pad(rows, return_tensors="pt").to(self._model.device)
            visible = padded.pop("attention_mask").bool()
            yield _Batch(ids, self._model.base_model.embeddings(**padded), visible)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores by the first token, [n, T, H] -> [n]."""
        pooler = self._model.base_model.pooler  # RoBERTa's head has its own
        return self._model.classifier(hidden if pooler is None else pooler(hidden))[:, 0]


class _Batch:
    """Some documents.

    Args:
        ids: Their numbers.
        hidden: What the last layer returned, or the embeddings [n, T, H].
        visible: Which tokens are no padding [n, T].
    """

    def __init__(self, ids: list[int], hidden: torch.Tensor, visible: torch.Tensor) -> None:
        self.ids, self.hidden, self.visible = ids, hidden, visible

    def keep(self, ids: set[int]) -> None:
        places = [place for place, number in enumerate(self.ids) if number in ids]
        if len(places) < len(self.ids):
            self.ids = [self.ids[place] for place in places]
            self.hidden, self.visible = self.hidden[places], self.visible[places]


class _Batches:
    """The documents of a request."""

    def __init__(self, batches: Iterator[_Batch]) -> None:
        self._batches = list(batches)

    def run(self, layer: nn.Module) -> None:
        for batch in self._batches:
            # Added to the attention scores, so that every implementation of attention takes it.
            added = torch.zeros_like(batch.visible, dtype=batch.hidden.dtype)
            added = added.masked_fill(~batch.visible, torch.finfo(batch.hidden.dtype).min)
            with linears_widened(batch.hidden):
                batch.hidden = layer(batch.hidden, added[:, None, None, :])

    def scores(self, head: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        found = {}
        for batch in self._batches:
            found |= dict(zip(batch.ids, head(batch.hidden).double().cpu().tolist(), strict=True))
        return np.array([found[number] for number in sorted(found)])

    def keep(self, ids: Sequence[int]) -> None:
        for batch in self._batches:
            batch.keep(set(ids))
        self._batches = [batch for batch in self._batches if batch.ids]
