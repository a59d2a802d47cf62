"""The reranker: asks a causal LM of every document whether it answers the query, layer by layer over all of them."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rap_env.components import MLP, Site
from rap_env.errors import RankingFailed
from rap_env.llm.embedded import EMBEDDED_NAME, cache_folder
from rap_env.llm.loading import load_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import kept_sites
from rap_env.memory.measured import keep_less_freed_memory, trim_freed_memory
from rap_env.rerank.adapter import EMBEDDED_ADAPTER, merge_adapter
from rap_env.rerank.candidates import AnswerHead, Candidates
from rap_env.rerank.layerwise import LayerwiseReranker, check_request
from rap_env.rerank.prompts import QWEN3, SMOLLM2, Prompts, Template
from rap_env.rerank.rows import cache_rows
from rap_env.rerank.selection import Decider
from rap_env.rerank.similarity import SimilarityExit, embedding_similarities
from rap_env.rerank.window import WeightWindow


@dataclass(frozen=True)
class MemoryBounds:
    """How much of a model and of a request is in memory at once; none of it changes a score.

    Attributes:
        chunk_tokens: Tokens that a layer runs over at once; None for all. See `Candidates`.
        stream_weights: Whether only the weights of two sites are in memory, of one layer's size, and the others in a
            file.
        embedding_share: Of the embedding's rows that are in memory, those used last, the others in a file; None for
            all. Without them the head leaves, too, but for the rows of the two answers.
        folder: For the files; by default `weights` in the cache folder.
        states_in_file: Whether the hidden states of all documents are in a file between two sites, and only a chunk's
            in memory.
    """

    chunk_tokens: int | None = 1024
    stream_weights: bool = False
    embedding_share: float | None = None
    folder: Path | None = None
    states_in_file: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise RankingFailed(f"expected chunks of at least 1 token; got {self.chunk_tokens}")
        if self.embedding_share is not None and not 0 < self.embedding_share <= 1:
            raise RankingFailed(f"expected a share of the embedding above 0 and at most 1; got {self.embedding_share}")


def own_of(name: str) -> tuple[Path | None, Template]:
    """A model's own adapter, and how it is asked where nobody says: only the embedded one has an adapter here."""
    return (EMBEDDED_ADAPTER, SMOLLM2) if name == EMBEDDED_NAME else (None, QWEN3)


class Reranker(LayerwiseReranker):
    """Ranks documents by logit(yes) - logit(no) of a causal LM that is asked of each whether it answers a query.

    All documents of a request are read together, layer by layer. With a decider some of them leave early: selected or
    dropped by the scores that the model's own head gives to what a layer returns (GRATING, arXiv 2510.15620). Threads
    may share a reranker; their requests are answered one after another.

    Args:
        llm: The model, with the mask that is applied to it; it belongs to the reranker from then on.
        template: How the model is asked.
        decider: After which layer who leaves, or who is not read at all; None reads every document with all layers.
        max_document_tokens: A document is cut behind so many tokens, or where the model's context ends; query and
            template never are.
        memory: What is in memory at once.

    Raises:
        RankingFailed: The template's answers begin with the same token, or there is no room for documents.
        UnsupportedArchitecture: The memory can't be bounded so for this model, on this device.
        WeightsUnavailable: The files for bounded memory can't be written.
    """

    def __init__(
        self,
        llm: SwitchableLLM,
        template: Template = QWEN3,
        decider: Decider | SimilarityExit | None = None,
        max_document_tokens: int = 512,
        memory: MemoryBounds = MemoryBounds(),
    ) -> None:
        super().__init__(decider)
        self.llm = llm
        self._prompts = Prompts(llm.tokenizer, template, max_document_tokens, llm.shape.context_tokens)
        self._head = AnswerHead(llm, self._prompts.yes, self._prompts.no)
        self._sites: list[list[Site]] = [[] for _ in range(1 + max(site.layer for site in llm.shape.sites))]
        for site in kept_sites(llm.mask):
            self._sites[site.layer].append(site)
        folder = memory.folder or cache_folder() / "weights"
        self._chunk_tokens, self._states_folder = memory.chunk_tokens, folder if memory.states_in_file else None
        self._window = WeightWindow(llm, folder) if memory.stream_weights else None
        if memory.embedding_share is not None:
            cache_rows(llm, memory.embedding_share, folder)
        trim_freed_memory()  # what the weights had that are in files now

    @classmethod
    def load(
        cls,
        name: str = EMBEDDED_NAME,
        adapter: str | Path | None = None,
        dtype: str = "bfloat16",
        device: str = "auto",
        **options: Any,
    ) -> "Reranker":
        """Loads a model and makes it a reranker.

        Args:
            name: A name or folder, as `load_llm` takes it.
            adapter: Folder with a LoRA adapter of peft, which is merged into the model; None for none, or the embedded
                model's own. That model is asked with the template that its adapter was trained with.
            dtype: As in `load_llm`.
            device: As in `load_llm`.
            **options: As in `Reranker`. Where weights are streamed, the C library keeps less freed memory from then on,
                for the whole process.

        Raises what `load_llm`, `merge_adapter` and `Reranker` raise.
        """
        if options.get("memory", MemoryBounds()).stream_weights:
            keep_less_freed_memory()
        llm = load_llm(name, dtype, device)
        own_adapter, template = own_of(name)
        if (adapter := adapter or own_adapter) is not None:
            merge_adapter(llm, adapter)
        return cls(llm, **{"template": template, **options})

    @property
    def n_layers(self) -> int:
        return len(self._sites)

    def token_counts(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Tokens that are read for each document alone [n]: its own, and those behind it.

        Raises:
            RankingFailed: As `rank`.
        """
        check_request(query, documents, None)
        return np.array([len(ending) for ending in self._prompts.of(query, documents).endings], int)

    @torch.inference_mode()
    def similarities(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Cosine of each document's mean input embedding with the query's [n]; -1 where one has no tokens.

        Raises:
            RankingFailed: As `rank`.
        """
        check_request(query, documents, None)
        tokens = self._prompts.alone(query, documents)
        return embedding_similarities(self.llm.model.get_input_embeddings(), tokens, self.llm.device)

    def _read(self, query: str, documents: Sequence[str]) -> Iterator[tuple[int, Candidates]]:
        prompt = self._prompts.of(query, documents)
        candidates = Candidates(self.llm, prompt, self._chunk_tokens, self._states_folder)
        walk = (site for own in self._sites for site in own) if self._window is None else self._window.walk()
        with contextlib.closing(candidates), contextlib.closing(walk):
            for layer, own in enumerate(self._sites):
                for site in itertools.islice(walk, len(own)):
                    if layer == self.n_layers - 1 and site.kind == MLP:
                        candidates.forget_all_but_the_last_tokens()
                    candidates.run(site)
                yield layer, candidates

    def _scores(self, reading: Candidates) -> np.ndarray:
        return reading.scores(self._head)
