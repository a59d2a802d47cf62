import numpy as np
import pytest
import torch

from rap_env.calibration import Corpus, clustered_windows, consecutive_windows, random_windows, window_kinds
from rap_env.errors import CorpusUnavailable, InvalidWorkload
from rap_env.llm.windows import check_windows


class NumberTokenizer:
    """A word's token is the number it spells."""

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def count_to(number: int, start: int = 0) -> str:
    return " ".join(str(value) for value in range(start, number))


TOKENIZER = NumberTokenizer()
CORPUS = Corpus("numbers", (count_to(60), count_to(100, start=60)))


@pytest.mark.parametrize("seed", range(20))
def test_random_windows_are_stretches_of_the_text_that_do_not_overlap(seed):
    windows = random_windows(CORPUS, TOKENIZER, n_samples=8, tokens_per_sample=12, seed=seed)
    assert windows.shape == (8, 12)
    assert windows.dtype == torch.long
    assert torch.equal(windows - windows[:, :1], torch.arange(12).expand(8, 12))
    assert windows.unique().numel() == 8 * 12


def test_random_windows_repeat_with_the_seed_and_move_without_it():
    first, again, other = (random_windows(CORPUS, TOKENIZER, 4, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_windows_reach_the_first_and_the_last_token():
    starts = {random_windows(CORPUS, TOKENIZER, 1, 97, seed=seed)[0, 0].item() for seed in range(60)}
    assert starts == {0, 1, 2, 3}


def test_a_corpus_that_just_suffices_is_taken_whole():
    assert random_windows(CORPUS, TOKENIZER, 10, 10).flatten().tolist() == list(range(100))


def test_a_short_corpus_is_refused_with_both_numbers():
    with pytest.raises(CorpusUnavailable, match="'numbers' has 100 tokens; 3 samples of 34 tokens need 102"):
        random_windows(CORPUS, TOKENIZER, n_samples=3, tokens_per_sample=34)


def test_drawing_windows_leaves_the_global_random_states_as_they_were():
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    random_windows(CORPUS, TOKENIZER, 4, 8)
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_consecutive_windows_start_at_the_first_token_and_drop_the_rest():
    assert consecutive_windows(count_to(8), TOKENIZER, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert consecutive_windows(count_to(9), TOKENIZER, 3, limit=2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert consecutive_windows(count_to(9), TOKENIZER, 3, limit=5).shape == (3, 3)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(CorpusUnavailable, match="the text has 8 tokens; one window needs 9"):
        consecutive_windows(count_to(8), TOKENIZER, tokens_per_sample=9)


@pytest.mark.parametrize(("n_windows", "tokens"), [(0, 8), (-1, 8), (2, 1), (2, 0), (2, -3), (1.5, 8)])
def test_no_window_and_windows_without_a_token_to_predict_are_refused(n_windows, tokens):
    message = f"at least 1 window of at least 2 tokens; got {n_windows} of {tokens}"
    with pytest.raises(InvalidWorkload, match=message):
        random_windows(CORPUS, TOKENIZER, n_windows, tokens)
    with pytest.raises(InvalidWorkload, match=message):
        consecutive_windows(count_to(100), TOKENIZER, tokens, limit=n_windows)


def test_windows_beyond_the_models_context_are_refused():
    check_windows(2, 128, context_tokens=128)
    with pytest.raises(InvalidWorkload, match="windows of 1,129 tokens are beyond the model's context of 128"):
        check_windows(2, 1129, context_tokens=128)


def test_of_a_corpus_with_kinds_as_many_windows_of_each_are_drawn_kind_after_kind():
    texts = (count_to(40), count_to(120, start=100), count_to(60, start=40), count_to(150, start=120))
    corpus = Corpus("numbers", texts, ("low", "high", "low", "high"))
    windows = random_windows(corpus, TOKENIZER, n_samples=6, tokens_per_sample=8, seed=3)
    assert [("low", "high")[int(window[0] >= 100)] for window in windows] == list(window_kinds(corpus, 6))
    alone = random_windows(Corpus("low", texts[0::2]), TOKENIZER, n_samples=3, tokens_per_sample=8, seed=3)
    assert torch.equal(windows[:3], alone)
    assert window_kinds(CORPUS, 3) == ("", "", "")
    assert corpus.digest != Corpus("numbers", texts).digest
    with pytest.raises(InvalidWorkload, match="as many windows of each of 2 kinds of text; got 5"):
        random_windows(corpus, TOKENIZER, n_samples=5, tokens_per_sample=8)
    with pytest.raises(CorpusUnavailable, match="expected a kind for each of 4 documents; got 1"):
        Corpus("numbers", texts, ("low",))
    with pytest.raises(CorpusUnavailable, match="expected text without kinds to cluster; that of 'numbers' has them"):
        clustered_windows(corpus, TOKENIZER, n_samples=2, tokens_per_sample=8)
