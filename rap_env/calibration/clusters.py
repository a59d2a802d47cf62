"""Cluster-based calibration data sampling: windows that every kind of text in a corpus has its part in."""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rap_env.calibration.corpus import Corpus
from rap_env.calibration.sampling import joined_tokens
from rap_env.errors import CorpusUnavailable
from rap_env.llm.sentences import encode_sentences
from rap_env.llm.windows import check_windows

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+\s+|\n+|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Clustering:
    """How a corpus is divided; the sizes are those of EvoP (arXiv 2502.14910).

    Attributes:
        n_clusters: k of k-means.
        sentences_per_chunk: Sentences that stay together. The encoder reads the beginning of a chunk: 256 tokens.
        encode: From N texts to vectors [N, D].
    """

    n_clusters: int = 5
    sentences_per_chunk: int = 60
    encode: Callable[[Sequence[str]], np.ndarray] = encode_sentences


EVOP = Clustering()


def clustered_windows(
    corpus: Corpus, tokenizer, n_samples: int, tokens_per_sample: int, seed: int = 0, clustering: Clustering = EVOP
) -> torch.LongTensor:
    """Draws windows by EvoP's CCDS (arXiv 2502.14910): chunks of sentences, embedded and clustered by k-means.

    For each window a random cluster gives its next chunk, again and again until the window is full; what is left of
    the last chunk is dropped. So rare kinds of text are drawn as often as common ones, as long as they last.

    Args:
        corpus: Text to draw from.
        tokenizer: Tokenizer of the model; no special tokens are added.
        n_samples: Windows to draw; the paper takes 5.
        tokens_per_sample: Length of each window; the paper takes 2,048.
        seed: Seed of k-means and of the draw.
        clustering: How the corpus is divided.

    Returns:
        Token ids, shape [n_samples, tokens_per_sample].

    Raises:
        CorpusUnavailable: The corpus has fewer chunks than clusters, or too few tokens, or its documents have kinds,
            which clusters know nothing of.
        InvalidWorkload: No window, or windows of one token.
        ModelUnavailable: The sentence encoder can't be had.
    """
    check_windows(n_samples, tokens_per_sample)
    if corpus.kinds:
        raise CorpusUnavailable(f"expected text without kinds to cluster; that of {corpus.name!r} has them")
    chunks = chunks_of(corpus, clustering.sentences_per_chunk)
    clusters = _clusters(chunks, clustering, seed, corpus.name)
    generator = np.random.default_rng(seed)
    samples = np.empty((n_samples, tokens_per_sample), dtype=np.int64)
    for number in range(n_samples):
        tokens = np.empty(0, dtype=np.int64)
        while len(tokens) < tokens_per_sample:
            clusters = [cluster for cluster in clusters if cluster]
            if not clusters:
                raise CorpusUnavailable(
                    f"the {len(chunks)} chunks of calibration corpus {corpus.name!r} are used up after {number} of"
                    f" {n_samples} samples of {tokens_per_sample} tokens"
                )
            cluster = clusters[generator.integers(len(clusters))]
            tokens = np.concatenate([tokens, joined_tokens([cluster.popleft()], tokenizer)])
        samples[number] = tokens[:tokens_per_sample]
    return torch.from_numpy(samples)


def chunks_of(corpus: Corpus, sentences_per_chunk: int) -> list[str]:
    """Neighbouring sentences in the order of the text; a chunk may run from one document into the next.

    A sentence ends at a full stop, question or exclamation mark before white space, or at the end of a line.
    """
    sentences = [sentence for document in corpus.documents for sentence in _SENTENCE.findall(document)]
    starts = range(0, len(sentences), sentences_per_chunk)
    return ["".join(sentences[start : start + sentences_per_chunk]) for start in starts]


def _clusters(chunks: list[str], clustering: Clustering, seed: int, name: str) -> list[deque[str]]:
    """The chunks of each cluster, in the order of the text."""
    if len(chunks) < clustering.n_clusters:
        raise CorpusUnavailable(
            f"calibration corpus {name!r} has {len(chunks)} chunks of {clustering.sentences_per_chunk} sentences;"
            f" {clustering.n_clusters} clusters need at least as many"
        )
    from sklearn.cluster import KMeans  # nobody else should wait for its import

    means = KMeans(clustering.n_clusters, n_init=10, random_state=seed)
    clusters: list[deque[str]] = [deque() for _ in range(clustering.n_clusters)]
    for chunk, label in zip(chunks, means.fit_predict(clustering.encode(chunks)), strict=True):
        clusters[label].append(chunk)
    return clusters
