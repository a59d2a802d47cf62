"""Reranking: which documents answer a query best, by a model that reads only as much as the answer needs."""

from rap_env.rerank.calibration import calibrate
from rap_env.rerank.clusters import ClusterRule
from rap_env.rerank.encoder import EncoderReranker
from rap_env.rerank.margins import MarginRule
from rap_env.rerank.prompts import QWEN3, SMOLLM2, Template
from rap_env.rerank.reranker import MemoryBounds, Reranker
from rap_env.rerank.selection import Decider, Decision, Ranking, replay

__all__ = [
    "QWEN3",
    "SMOLLM2",
    "ClusterRule",
    "Decider",
    "Decision",
    "EncoderReranker",
    "MarginRule",
    "MemoryBounds",
    "Ranking",
    "Reranker",
    "Template",
    "calibrate",
    "replay",
]
