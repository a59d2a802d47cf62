"""CCDS gives every kind of text its part of the windows, whole chunks of sentences at a time."""

import numpy as np
import pytest
import torch

from rap_env.calibration import Clustering, Corpus, clustered_windows
from rap_env.calibration.clusters import chunks_of
from rap_env.errors import CorpusUnavailable, InvalidWorkload

KINDS = ("fish", "bird")


class WordTokenizer:
    """A word's token is the number in it; `fish12.` is 12, `bird12.` is 1012."""

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[int(w.strip(".")[4:]) + 1000 * w.startswith("bird") for w in t.split()] for t in texts]}


def encode(texts) -> np.ndarray:
    """Counts of the kinds: what an encoder would make of such texts."""
    return np.array([[text.count(kind) for kind in KINDS] for text in texts], dtype=np.float32)


def sentences(kind: str, number: int) -> str:
    """One sentence a word: the corpus of the tests has as many tokens as sentences."""
    return "".join(f"{kind}{index}. " for index in range(number))


TOKENIZER, CLUSTERING = WordTokenizer(), Clustering(n_clusters=2, sentences_per_chunk=10, encode=encode)
CORPUS = Corpus("animals", (sentences("fish", 900), sentences("bird", 100)))


def test_a_rare_kind_is_drawn_as_often_as_a_common_one():
    windows = torch.cat([clustered_windows(CORPUS, TOKENIZER, 1, 80, seed, CLUSTERING) for seed in range(30)])
    assert windows.shape == (30, 80) and windows.dtype == torch.long
    assert 0.4 < (windows >= 1000).float().mean() < 0.6


def test_windows_are_chunks_one_behind_the_other_each_cluster_in_the_order_of_the_text():
    windows = clustered_windows(CORPUS, TOKENIZER, 3, 40, 0, CLUSTERING)
    chunks = windows.reshape(-1, 10)
    assert torch.equal(chunks - chunks[:, :1], torch.arange(10).expand(12, 10))
    starts = chunks[:, 0]
    for kind in (starts[starts < 1000], starts[starts >= 1000]):
        assert torch.equal(kind - kind[0], 10 * torch.arange(len(kind))) and kind[0] % 1000 == 0


def test_the_rest_of_a_cut_chunk_is_dropped():
    windows = clustered_windows(CORPUS, TOKENIZER, 4, 15, 0, CLUSTERING)
    assert windows.unique().numel() == 4 * 15
    assert (windows[:, 0] % 10 == 0).all() and (windows[:, 10] % 10 == 0).all()


def test_windows_repeat_with_the_seed_and_move_without_it():
    first, again, other = (clustered_windows(CORPUS, TOKENIZER, 3, 40, seed, CLUSTERING) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_used_up_cluster_leaves_the_draw_to_the_others():
    windows = clustered_windows(CORPUS, TOKENIZER, 1, 1000, 0, CLUSTERING)
    assert windows.unique().numel() == 1000


def test_a_corpus_that_is_too_short_is_refused_with_the_numbers():
    with pytest.raises(
        CorpusUnavailable, match="chunks of calibration corpus 'animals' are used up after 1 of 2 samples"
    ):
        clustered_windows(CORPUS, TOKENIZER, 2, 600, 0, CLUSTERING)
    with pytest.raises(CorpusUnavailable, match="has 1 chunks of 10 sentences; 2 clusters need"):
        clustered_windows(Corpus("short", (sentences("fish", 9),)), TOKENIZER, 1, 4, 0, CLUSTERING)
    with pytest.raises(InvalidWorkload, match="got 0 of 40"):
        clustered_windows(CORPUS, TOKENIZER, 0, 40, 0, CLUSTERING)


def test_chunks_keep_the_text_of_their_sentences():
    text = "One. Two? Three!\nA line\nVersion 1.5 is out.\n\nLast"
    assert chunks_of(Corpus("text", (text,)), 1) == [
        "One. ",
        "Two? ",
        "Three!\n",
        "A line\n",
        "Version 1.5 is out.\n\n",
        "Last",
    ]
    assert chunks_of(Corpus("text", (text, text)), 4)[1] == "Version 1.5 is out.\n\nLastOne. Two? "


def test_drawing_leaves_the_global_random_states_as_they_were():
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    clustered_windows(CORPUS, TOKENIZER, 2, 20, 0, CLUSTERING)
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
