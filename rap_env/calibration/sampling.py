"""From calibration text to the token windows that importance and perplexity are measured on."""

import numpy as np
import torch

from rap_env.calibration.corpus import Corpus
from rap_env.errors import CorpusUnavailable, InvalidWorkload
from rap_env.llm.windows import check_windows


def random_windows(
    corpus: Corpus, tokenizer, n_samples: int, tokens_per_sample: int, seed: int = 0
) -> torch.LongTensor:
    """Draws windows that don't overlap, every placement of them being equally likely.

    The documents are joined without separators, so a window may run from one document into the next. Of a corpus with
    kinds of text as many windows of each kind are drawn, one kind after the other (`window_kinds`).

    Args:
        corpus: Text to draw from.
        tokenizer: Tokenizer of the model; no special tokens are added.
        n_samples: Windows to draw.
        tokens_per_sample: Length of each window.
        seed: Seed of the draw.

    Returns:
        Token ids, shape [n_samples, tokens_per_sample], in the order of the text.

    Raises:
        CorpusUnavailable: The corpus has fewer tokens than the windows together.
        InvalidWorkload: No window, or windows of one token, or not as many of each kind.
    """
    check_windows(n_samples, tokens_per_sample)
    if corpus.kinds:
        n_each = window_kinds(corpus, n_samples).count(corpus.kinds[0])
        drawn = [random_windows(each, tokenizer, n_each, tokens_per_sample, seed) for each in corpus.by_kind().values()]
        return torch.cat(drawn)
    tokens = joined_tokens(list(corpus.documents), tokenizer)
    needed = n_samples * tokens_per_sample
    if len(tokens) < needed:
        raise CorpusUnavailable(
            f"calibration corpus {corpus.name!r} has {len(tokens):,} tokens; {n_samples} samples of"
            f" {tokens_per_sample} tokens need {needed:,}"
        )
    # Shrink each window to one position, choose distinct positions, and let the windows grow again.
    positions = len(tokens) - needed + n_samples
    chosen = np.sort(np.random.default_rng(seed).choice(positions, size=n_samples, replace=False))
    starts = chosen + np.arange(n_samples) * (tokens_per_sample - 1)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(tokens_per_sample)])


def window_kinds(corpus: Corpus, n_samples: int) -> tuple[str, ...]:
    """Kinds of text of the windows that `random_windows` draws from a corpus; `""` for all of one without kinds.

    Raises:
        InvalidWorkload: There can't be as many windows of each kind.
    """
    kinds = list(corpus.by_kind())
    if n_samples % len(kinds):
        raise InvalidWorkload(f"expected as many windows of each of {len(kinds)} kinds of text; got {n_samples}")
    return tuple(kind for kind in kinds for _ in range(n_samples // len(kinds)))


def consecutive_windows(text: str, tokenizer, tokens_per_sample: int, limit: int | None = None) -> torch.LongTensor:
    """Cuts a text from its start into windows, as perplexity protocols do; a shorter rest is dropped.

    Args:
        text: The whole text.
        tokenizer: Tokenizer of the model; no special tokens are added.
        tokens_per_sample: Length of each window.
        limit: Windows at most; None takes all.

    Returns:
        Token ids, shape [n_windows, tokens_per_sample].

    Raises:
        CorpusUnavailable: The text is shorter than one window.
        InvalidWorkload: A limit of no window, or windows of one token.
    """
    check_windows(1 if limit is None else limit, tokens_per_sample)
    tokens = joined_tokens([text], tokenizer)
    if len(tokens) < tokens_per_sample:
        raise CorpusUnavailable(f"the text has {len(tokens):,} tokens; one window needs {tokens_per_sample:,}")
    whole = len(tokens) // tokens_per_sample * tokens_per_sample
    return torch.from_numpy(tokens[:whole].reshape(-1, tokens_per_sample)[:limit])


def joined_tokens(texts: list[str], tokenizer) -> np.ndarray:
    """Tokens [T] of texts, one behind the other, without special tokens."""
    # verbose=False: a text beyond the model's context is no mistake here, it is cut into windows
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([token for row in rows for token in row], dtype=np.int64)
