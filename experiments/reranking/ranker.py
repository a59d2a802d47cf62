"""Builds a system from its description, and lets it rank."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from experiments.reranking.heads import AttentionHeads, Example
from experiments.reranking.padded import PaddedBatches, offload
from experiments.reranking.systems import CROSS_ENCODER, HEADS, MARGINS, OFFLOADED, RERANKER, System
from rap_env.calibration.corpus import packaged_corpus
from rap_env.calibration.sampling import random_windows
from rap_env.components import MLP, Site
from rap_env.llm.formats import quantise
from rap_env.llm.loading import load_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.memory.measured import keep_less_freed_memory
from rap_env.rerank import ClusterRule, Decider, MarginRule, MemoryBounds, Reranker, Template
from rap_env.rerank.adapter import merge_adapter
from rap_env.rerank.prompts import Prompts
from rap_env.rerank.reranker import own_of
from rap_env.widths.prepare import prepare_widths

_WINDOWS = (6, 256)  # windows and tokens of text that channels are ordered on


class Ranked(NamedTuple):
    """The outcome of a request.

    Attributes:
        ids: Numbers of the documents, the best first.
        layers: Mean number of layers that read a document.
        read_bytes: Bytes of weights that were read from files; None where nobody counts them.
    """

    ids: list[int]
    layers: float
    read_bytes: int | None


class Scorer(Protocol):
    """What the rivals have in common."""

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """A score of each document, higher for better ones."""


class Ranker:
    """A system with its model.

    Args:
        system: What is switched on.
        spec: `model_name`, `dtype`, `adapter`, `template`, `max_document_tokens`, `batch_size`, `kept_channels`,
            `n_heads`, `bounds` and `rule`, as in conf/rerank.yaml, `folder` for files, `examples` for the heads, and
            `noise` of each layer for margins.
    """

    def __init__(self, system: System, spec: Mapping[str, Any]) -> None:
        self.system, self._spec = system, spec
        template = _template(spec)
        llm = self._load()
        self._n_layers = 1 + max(site.layer for site in llm.shape.sites)
        self._site_bytes = _site_bytes(llm)
        if system.reads == RERANKER:
            bounds = self._bounds()
            self._reranker = Reranker(llm, template, None, spec["max_document_tokens"], bounds)
        else:
            self._scorer = self._rival(llm, template)

    def rank(self, query: str, documents: Sequence[str], top_k: int | None, threshold: float | None) -> Ranked:
        """The best documents.

        Args:
            query: What is asked for.
            documents: The candidates.
            top_k: How many; None for all.
            threshold: Of the rule that prunes; None: nobody leaves early.
        """
        if self.system.reads != RERANKER:
            scores = np.array(self._scorer.scores(query, documents))
            return Ranked(np.argsort(-scores, kind="stable")[:top_k].tolist(), self._n_layers, None)
        self._reranker.decider = None if threshold is None else self._rule(threshold)
        rows_before = self._rows_read()
        ranking = self._reranker.ranking(query, documents, top_k)
        read_bytes = (self._rows_read() - rows_before) * self._row_bytes()
        if self.system.streams:  # the site behind the last layer that ran was read ahead
            n_run = sum(site.layer < max(ranking.layers) for site in self._site_bytes)
            read_bytes += sum(list(self._site_bytes.values())[: n_run + 1])
        return Ranked(list(ranking.ids), float(np.mean(ranking.layers)), read_bytes)

    def path(self, query: str, documents: Sequence[str]) -> list[list[float]]:
        """Scores after every layer [layers, n]."""
        return self._reranker.score_path(query, documents).tolist()

    def token_counts(self, query: str, documents: Sequence[str]) -> list[int]:
        """Tokens that are read for each document alone [n]."""
        return self._reranker.token_counts(query, documents).tolist()

    def _rule(self, threshold: float) -> Decider:
        if self.system.prunes == MARGINS:
            return MarginRule(tuple(self._spec["noise"]), threshold)
        return ClusterRule(threshold, **self._spec["rule"])

    def _load(self) -> SwitchableLLM:
        spec, system = self._spec, self.system
        if system.streams:
            keep_less_freed_memory()  # as `Reranker.load` does
        llm = load_reranker_llm(spec, "group" if system.masks else "block")
        if system.masks:
            mask_channels(llm, spec["kept_channels"], Path(spec["folder"]))
        if system.weights != "full":
            llm = SwitchableLLM(quantise(llm.model, system.weights), llm.tokenizer, llm.name)
        return llm

    def _rival(self, llm: SwitchableLLM, template: Template) -> Scorer:
        spec = self._spec
        prompts = Prompts(llm.tokenizer, template, spec["max_document_tokens"], llm.shape.context_tokens)
        if self.system.reads == CROSS_ENCODER:
            from experiments.reranking.cross_encoder import PromptedCrossEncoder

            copy, cut = Path(spec["folder"]) / "cross_encoder", spec["max_document_tokens"]
            return PromptedCrossEncoder(llm, prompts, template, cut, spec["batch_size"], copy)
        if self.system.reads == HEADS:
            examples = [Example(**each) for each in spec["examples"]]
            return AttentionHeads(llm, spec["max_document_tokens"], examples, spec["n_heads"])
        model = llm.model
        if self.system.reads == OFFLOADED:
            model = offload(model, Path(spec["folder"]) / "offloaded")
        return PaddedBatches(model, prompts, spec["batch_size"])

    def _bounds(self) -> MemoryBounds:
        system, bounds = self.system, self._spec["bounds"]
        return MemoryBounds(
            chunk_tokens=bounds["chunk_tokens"][system.chunks] if system.chunks else None,
            stream_weights=system.streams,
            embedding_share=bounds["embedding_share"] if system.caches_rows else None,
            folder=Path(self._spec["folder"]),
            states_in_file=system.files_states,
        )

    def _rows_read(self) -> int:
        return getattr(self._reranker.llm.model.get_input_embeddings(), "rows_read", 0)

    def _row_bytes(self) -> int:
        return self._reranker.llm.shape.hidden_size * self._reranker.llm.dtype.itemsize


def load_reranker_llm(spec: Mapping[str, Any], granularity: str = "block") -> SwitchableLLM:
    """The model with its adapter merged; `model_name`, `dtype` and `adapter` of the specification are read."""
    llm = load_llm(spec["model_name"], spec["dtype"], "cpu", granularity=granularity)
    if adapter := _adapter(spec):
        merge_adapter(llm, adapter)
    return llm


def mask_channels(llm: SwitchableLLM, kept_share: float, folder: Path) -> None:
    """Orders a model's MLP channels by Wanda's scores, drops the last of every layer, and frees their memory.

    Args:
        llm: Of the granularity `"group"`.
        kept_share: Of the groups of channels of each MLP.
        folder: For the file that the weights go to.
    """
    windows = random_windows(packaged_corpus(), llm.tokenizer, *_WINDOWS)
    prepare_widths(llm, torch.as_tensor(windows))
    widths = []
    for site, positions in llm.shape.components.sites:
        n_parts = positions.stop - positions.start
        widths.append(max(1, round(kept_share * n_parts)) if site.kind == MLP else n_parts)
    WeightStore(llm, folder).switch(PruningMask.from_widths(llm.shape, widths))


def _adapter(spec: Mapping[str, Any]) -> str | Path | None:
    """As `Reranker.load` has it: the embedded model has an adapter of its own, unless it is switched off."""
    return own_of(spec["model_name"])[0] if spec["adapter"] is None else spec["adapter"] or None


def _template(spec: Mapping[str, Any]) -> Template:
    if spec["template"] is not None:
        return Template(**spec["template"])
    return own_of(spec["model_name"])[1]


def _site_bytes(llm: SwitchableLLM) -> dict[Site, int]:
    """Bytes of the kept components of each site that has any, in their order."""
    sites: dict[Site, int] = {}
    for component in llm.mask.kept:
        sites[component.site] = sites.get(component.site, 0) + component.weight_bytes
    return sites
