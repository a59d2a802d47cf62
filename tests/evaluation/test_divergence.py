"""Divergences are those of upstream's whole distributions, zero for the dense model, and those of each mask alone."""

import pytest
import torch
from torch.nn import functional

from rap_env.evaluation import perplexity
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.evaluation.test_perplexity import random_masks


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def divergence_of(llm, windows, mask) -> float:
    """Mean by upstream's plain forwards, in float64."""
    dense = llm.model(windows).logits[:, :-1].double().log_softmax(-1)
    with llm.pruned(mask):
        masked = llm.model(windows).logits[:, :-1].double().log_softmax(-1)
    return functional.kl_div(masked, dense, reduction="none", log_target=True).sum(-1).mean().item()


@pytest.fixture(params=[(1024, 2048), (4, 100)], ids=["one tile", "tiles"])
def tiles(request, monkeypatch) -> None:
    rows, words = request.param
    monkeypatch.setattr(perplexity, "_TILE_ROWS", 2 * rows)
    monkeypatch.setattr(perplexity, "_TILE_WORDS", words)  # 257 words: cuts of 100, 100 and 57


def test_divergences_are_those_of_the_whole_distributions(tiny_llm, windows, tiles):
    masks = random_masks(tiny_llm.shape, 12)
    measured = dict(DivergenceEvaluator(windows, "toy text").evaluate_many(tiny_llm, masks))
    assert measured.keys() == set(masks)
    for mask in masks:
        assert -measured[mask].score == pytest.approx(divergence_of(tiny_llm, windows, mask), abs=1e-5)
    dense = PruningMask.all_kept(tiny_llm.shape)
    assert measured[dense].score == pytest.approx(0.0, abs=1e-6)
    assert all(evaluation.score < -1e-3 for mask, evaluation in measured.items() if mask != dense)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_evaluated_together_have_exactly_the_scores_of_each_alone(windows, dtype):
    llm = build_tiny_llm(dtype=dtype)
    evaluator, masks = DivergenceEvaluator(windows, "toy text"), random_masks(llm.shape, 7)  # no multiple of `together`
    with llm.pruned(masks[4]):
        together = dict(evaluator.evaluate_many(llm, masks))
    for mask in masks:
        with llm.pruned(mask):
            assert together[mask] == evaluator.evaluate(llm)
    assert len({evaluation.score for evaluation in together.values()}) == 7


def test_the_score_is_minus_the_mean_and_the_identity_its_own(tiny_llm, windows):
    mask = PruningMask.all_kept(tiny_llm.shape).drop("layer1.mlp")
    evaluator = DivergenceEvaluator(windows, "toy text")
    with tiny_llm.pruned(mask):
        evaluation = evaluator.evaluate(tiny_llm)
    mean = divergence_of(tiny_llm, windows, mask)
    assert evaluation.score == pytest.approx(-mean, abs=1e-5)
    assert evaluation.tasks == {"toy text": {"divergence": -evaluation.score, "items": 5}}
    of_perplexity = PerplexityEvaluator(windows, "toy text")
    assert evaluator.identity | {"evaluator": "perplexity"} == of_perplexity.identity != evaluator.identity
    assert (evaluator.setup_tokens, of_perplexity.setup_tokens) == (60, 0), "the dense model is run for it"


def test_the_dense_model_runs_once_for_each_model(windows):
    llm, other = build_tiny_llm(), build_tiny_llm("llama", n_layers=2)
    evaluator = DivergenceEvaluator(windows, "toy text")
    for model, n_components in ((llm, 8), (other, 4)):
        mask = PruningMask.all_kept(model.shape).drop("layer1.mlp")
        executions = []
        for _repeat in range(2):
            before = model.site_executions
            values = dict(evaluator.evaluate_many(model, [mask]))
            executions.append(model.site_executions - before)
        assert executions == [2 * n_components - 1, n_components - 1]
        assert -values[mask].score == pytest.approx(divergence_of(model, windows, mask), abs=1e-5)


def test_the_last_tokens_alone_have_their_own_divergences(tiny_llm, windows):
    mask = PruningMask.all_kept(tiny_llm.shape).drop("layer1.mlp")
    with torch.inference_mode():
        dense = tiny_llm.model(windows).logits[:, -5:-1].double().log_softmax(-1)
        with tiny_llm.pruned(mask):
            masked = tiny_llm.model(windows).logits[:, -5:-1].double().log_softmax(-1)
    expected = functional.kl_div(masked, dense, reduction="none", log_target=True).sum(-1).mean().item()
    measured = dict(DivergenceEvaluator(windows, "toy text", 4).evaluate_many(tiny_llm, [mask]))
    assert -measured[mask].score == pytest.approx(expected, abs=1e-5)
