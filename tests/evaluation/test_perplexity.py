"""Perplexity follows its protocol: windows without BOS, first token unscored, float32 logits, mean over tokens."""

import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from rap_env.errors import InvalidWorkload
from rap_env.evaluation import perplexity
from rap_env.evaluation.perplexity import PerplexityEvaluator, tokens_digest
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask

WIKITEXT = Path(__file__).parents[2].parent / "shared" / "text" / "wikitext2_test.txt"


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def loss_of(model, window) -> float:
    """Mean loss of one window by upstream's plain forward."""
    logits = model(window[None]).logits[0].double().log_softmax(-1)
    return -sum(logits[position - 1, window[position]].item() for position in range(1, len(window))) / (len(window) - 1)


def loss_under(llm, windows, mask) -> float:
    """Mean loss over all windows by upstream's plain forwards."""
    with llm.pruned(mask):
        return sum(loss_of(llm.model, window) for window in windows) / len(windows)


def losses_of(llm, windows) -> list[float]:
    """Loss of each window, evaluated by itself, under the mask that is applied."""
    return [-PerplexityEvaluator(window[None], "toy text").evaluate(llm).score for window in windows]


def random_masks(shape, n: int) -> list[PruningMask]:
    """Distinct masks, the one that drops everything and the dense one among them."""
    rng, n_bits = random.Random(0), len(shape.components)
    codes = [0, 2**n_bits - 1, *rng.sample(range(1, 2**n_bits - 1), n - 2)]
    return [PruningMask.from_bits(shape, [code >> bit & 1 for bit in range(n_bits)]) for code in codes]


@pytest.mark.parametrize("dropped", [(), ("layer0.attention", "layer3.mlp")])
def test_window_losses_equal_plain_forwards(tiny_llm, windows, dropped):
    with tiny_llm.pruned(PruningMask.all_kept(tiny_llm.shape).drop(*dropped)):
        assert losses_of(tiny_llm, windows) == pytest.approx([loss_of(tiny_llm.model, w) for w in windows], abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 12, 30, 10_000])
def test_losses_do_not_depend_on_the_batch(tiny_llm, windows, batch_tokens, monkeypatch):
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", batch_tokens)
    dense = PruningMask.all_kept(tiny_llm.shape)
    evaluation = PerplexityEvaluator(windows, "toy text").evaluate(tiny_llm)
    assert -evaluation.score == pytest.approx(loss_under(tiny_llm, windows, dense), abs=1e-5)


def test_losses_do_not_depend_on_how_the_head_is_cut(tiny_llm, windows, monkeypatch):
    monkeypatch.setattr(perplexity, "_TILE_ROWS", 4)  # 11 scored tokens a window: cuts of 4, and a rest
    monkeypatch.setattr(perplexity, "_TILE_WORDS", 100)  # 256 words: cuts of 100, 100 and 56
    assert losses_of(tiny_llm, windows) == pytest.approx([loss_of(tiny_llm.model, w) for w in windows], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_tokens", [24, 10_000])  # three batches, or one
def test_losses_under_many_masks_are_exactly_those_of_each_mask_alone(windows, dtype, batch_tokens, monkeypatch):
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", batch_tokens)
    llm, evaluator = build_tiny_llm(dtype=dtype), PerplexityEvaluator(windows, "toy text")
    masks = random_masks(llm.shape, 12)
    together = list(evaluator.evaluate_many(llm, masks))
    assert sorted(mask.keep for mask, _ in together) == sorted(mask.keep for mask in masks), "each mask once"
    for mask, evaluation in together:
        assert [(mask, evaluation)] == list(evaluator.evaluate_many(llm, [mask]))
    assert len({evaluation.score for _, evaluation in together}) == 12  # so that no mask could be taken for another


@pytest.mark.parametrize("batch_tokens", [24, 10_000])
def test_what_is_held_between_calls_changes_no_score(tiny_llm, windows, batch_tokens, monkeypatch):
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", batch_tokens)
    masks, holding = random_masks(tiny_llm.shape, 12), PerplexityEvaluator(windows, "toy text")
    expected = dict(PerplexityEvaluator(windows, "toy text").evaluate_many(tiny_llm, masks))
    for near, *asked in (masks[i : i + 4] for i in range(8)):
        assert dict(holding.evaluate_many(tiny_llm, [near, *asked], near)) == {m: expected[m] for m in (near, *asked)}


def test_many_masks_are_evaluated_as_each_alone_whatever_mask_is_applied(tiny_llm, windows):
    evaluator, masks = PerplexityEvaluator(windows, "toy text"), random_masks(tiny_llm.shape, 12)
    with tiny_llm.pruned(masks[4]):
        together = dict(evaluator.evaluate_many(tiny_llm, masks))
        assert tiny_llm.mask == masks[4]
    assert together.keys() == set(masks)
    for mask in masks:
        with tiny_llm.pruned(mask):
            alone = evaluator.evaluate(tiny_llm)
        assert (together[mask], together[mask].tokens) == (alone, alone.tokens)


def test_the_score_is_minus_the_mean_loss_and_perplexity_its_exponential(tiny_llm, windows):
    losses = [loss_of(tiny_llm.model, w) for w in windows]
    evaluation = PerplexityEvaluator(windows, "toy text").evaluate(tiny_llm)
    mean = sum(losses) / 5
    assert evaluation.score == pytest.approx(-mean, abs=1e-5)
    assert evaluation.tasks == {
        "toy text": {"loss": pytest.approx(mean), "perplexity": pytest.approx(math.exp(mean)), "items": 5}
    }
    assert evaluation.tokens == 60


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(windows):
    llm = build_tiny_llm()
    llm.model.lm_head.weight.zero_()  # every token is as likely as any other
    assert PerplexityEvaluator(windows, "text").evaluate(llm).tasks["text"]["perplexity"] == pytest.approx(
        257.0, abs=1e-3
    )


def test_in_bfloat16_the_loss_is_not_rounded_to_bfloat16(windows):
    llm = build_tiny_llm(dtype="bfloat16")
    with torch.inference_mode():
        hidden = llm.run(llm.shape.sites, *llm.open_stream(windows))
        logits = llm.logits(hidden[:, :-1].reshape(-1, hidden.shape[-1]))
    expected = functional.cross_entropy(logits.double(), windows[:, 1:].reshape(-1)).item()
    assert abs(torch.tensor(expected).bfloat16().item() - expected) > 1e-4  # so that rounding would show
    losses = losses_of(llm, windows)
    assert sum(losses) / 5 == pytest.approx(expected, abs=1e-5)


def test_the_identity_changes_with_tokens_and_with_how_they_are_cut(windows):
    changed = windows.clone()
    changed[4, 11] += 1
    others = [changed, windows.reshape(6, 10), windows[:4], windows.to(torch.int32)]
    digests = [PerplexityEvaluator(w, "text").identity["windows"] for w in (windows, *others)]
    assert len(set(digests)) == 5
    assert PerplexityEvaluator(windows.clone(), "text").identity == PerplexityEvaluator(windows, "text").identity
    assert tokens_digest(windows) == digests[0]


def test_the_name_belongs_to_the_identity_because_results_carry_it(windows):
    assert PerplexityEvaluator(windows, "one").identity != PerplexityEvaluator(windows, "other").identity


def test_a_loss_beyond_the_range_of_exp_is_kept_without_a_perplexity(windows):
    llm = build_tiny_llm()
    llm.model.lm_head.weight.mul_(3000)
    evaluation = PerplexityEvaluator(windows, "text").evaluate(llm)
    assert evaluation.tasks["text"] == {"loss": -evaluation.score, "items": 5} and -evaluation.score > 710


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_windows_with_nothing_to_predict_are_refused(shape):
    with pytest.raises(InvalidWorkload, match="expected at least 1 window of at least 2 tokens"):
        PerplexityEvaluator(torch.zeros(shape, dtype=torch.long), "text")


def test_windows_beyond_the_models_context_are_refused():
    llm = build_tiny_llm("opt")  # 512 tokens
    with pytest.raises(InvalidWorkload, match="windows of 513 tokens are beyond the model's context of 512"):
        PerplexityEvaluator(torch.zeros(1, 513, dtype=torch.long), "text").evaluate(llm)


def test_windows_with_tokens_that_the_model_does_not_know_are_refused(tiny_llm):
    windows = torch.tensor([[1, 2, 257, 3]])
    with pytest.raises(InvalidWorkload, match="windows have token 257; the model knows 257: made with"):
        PerplexityEvaluator(windows, "text").evaluate(tiny_llm)


@pytest.mark.llm
@pytest.mark.slow
def test_the_dense_embedded_model_has_the_published_perplexity(embedded_llm):
    if not WIKITEXT.is_file():
        pytest.skip(f"no WikiText-2 test text at {WIKITEXT}")
    text = WIKITEXT.read_text()[:400_000]  # far more than 64 windows need; the rest would only be tokenised
    ids = embedded_llm.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    windows = torch.tensor(ids[: 64 * 512]).reshape(64, 512)
    evaluation = PerplexityEvaluator(windows, "wikitext2").evaluate(embedded_llm)
    assert evaluation.tasks["wikitext2"]["perplexity"] == pytest.approx(26.17, rel=0.005)


def test_the_first_part_of_an_evaluator_has_the_first_windows_and_an_identity_of_its_own(windows, tiny_llm):
    evaluator = PerplexityEvaluator(windows, "text")
    for fraction, n_windows in ((0.01, 1), (0.2, 1), (0.21, 2), (0.81, 5)):
        part = evaluator.first(fraction)
        assert torch.equal(part.windows, windows[:n_windows]) and type(part) is PerplexityEvaluator
        assert part.tokens(tiny_llm) == n_windows * 12
        assert (part.identity == evaluator.identity) == (n_windows == 5)


def test_the_same_last_tokens_are_scored_behind_contexts_of_several_lengths(tiny_llm, windows):
    for context_tokens in (1, 5, 9):
        cut = perplexity.cut_contexts(windows, context_tokens, 3)
        assert cut.shape == (5, context_tokens + 3) and torch.equal(cut[:, -3:], windows[:, -3:])
        evaluator = PerplexityEvaluator(cut, "toy text", 3)
        with torch.inference_mode():
            logits = tiny_llm.model(cut).logits[:, -4:-1].double().log_softmax(-1)
        expected = -logits.gather(-1, cut[:, -3:, None]).mean().item()
        assert -evaluator.evaluate(tiny_llm).score == pytest.approx(expected, abs=1e-5)
        assert evaluator.tokens(tiny_llm) == 5 * (context_tokens + 3), "context is paid for"
        assert evaluator.first(0.5).target_tokens == 3


def test_which_tokens_are_scored_is_in_the_identity_unless_it_is_all_of_them(windows):
    some, all_of_them = (PerplexityEvaluator(windows, "toy text", n).identity for n in (4, 11))
    assert some != all_of_them == PerplexityEvaluator(windows, "toy text").identity


@pytest.mark.parametrize("target_tokens", [0, 12])
def test_windows_that_do_not_hold_the_scored_tokens_are_refused(windows, target_tokens):
    with pytest.raises(InvalidWorkload, match=f"expected 1 to 11 scored tokens in windows of 12; got {target_tokens}"):
        PerplexityEvaluator(windows, "toy text", target_tokens)
    with pytest.raises(InvalidWorkload, match=f"at most 12 together; got 12 and {target_tokens}"):
        perplexity.cut_contexts(windows, 12, target_tokens)
