"""An exit before the first layer: documents whose embeddings are less similar to the query's are not read at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rap_env.errors import RankingFailed
from rap_env.rerank.selection import Decider, Ranking, replay


@dataclass(frozen=True)
class SimilarityExit:
    """Drops documents by the similarity of input embeddings, in the style of SEE (SIGIR 2025).

    The paper compares the embeddings of the query's and a document's tokens, and filters the documents of a request by
    how they compare with one another, best before any layer. The rule here: a similarity is the cosine between the mean
    input embeddings of query and document, and who lies more than a margin below the K-th highest one is dropped.

    Attributes:
        margin: In standard deviations of the request's similarities, at least 0; with 0 only K documents are read.
        decider: Decides over the documents that are read; None reads these with all layers.

    Raises:
        RankingFailed: The margin is negative or no number.
    """

    margin: float
    decider: Decider | None = None

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise RankingFailed(f"expected a margin of at least 0; got {self.margin}")

    def kept(self, similarities: np.ndarray, top_k: int | None) -> list[int]:
        """Numbers of the documents that are read, ascending; all of them where their order is asked for.

        Args:
            similarities: Of all documents [n].
            top_k: K; None for all.
        """
        if top_k is None or top_k >= len(similarities):
            return list(range(len(similarities)))
        lowest = np.sort(similarities)[-top_k] - self.margin * similarities.std()
        return np.flatnonzero(similarities >= lowest).tolist()

    def replay(self, path: np.ndarray, similarities: np.ndarray, top_k: int) -> Ranking:
        """As `rap_env.rerank.selection.replay`, with the similarities of all documents [n]."""
        kept = self.kept(similarities, top_k)
        return among(replay(path[:, kept], self.decider, top_k), kept, path.shape[1])


def embedding_similarities(embedding: nn.Module, tokens: Sequence[Sequence[int]], device: torch.device) -> np.ndarray:
    """Cosine of each document's mean input embedding with the query's [n]; -1 where one has no tokens.

    Args:
        embedding: Of a model's input.
        tokens: Of the query, then of each document.
        device: Where the embedding takes them.
    """
    rows = (embedding(torch.tensor(own, dtype=torch.long, device=device)) for own in tokens)
    query_mean, *others = [functional.normalize(own.double().mean(0), dim=0) for own in rows]
    return np.nan_to_num([float(query_mean @ mean) for mean in others], nan=-1.0)


def among(ranking: Ranking, kept: list[int], n_documents: int) -> Ranking:
    """A ranking of some documents as one of all: the others were read by no layer, and their scores are NaN."""
    scores, layers = np.full(n_documents, np.nan), np.zeros(n_documents, int)
    scores[kept], layers[kept] = ranking.scores, ranking.layers
    return Ranking(tuple(kept[place] for place in ranking.ids), tuple(scores.tolist()), tuple(layers.tolist()))
