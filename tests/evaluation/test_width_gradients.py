"""Gradients through soft gates: at whole widths the masked model, between them the slope that differences have."""

import pytest
import torch

from rap_env.errors import InvalidMask, InvalidWorkload, SearchExhausted, UnsupportedArchitecture
from rap_env.evaluation import width_gradients
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.width_gradients import PASSES, WidthGradients, soft_gates
from rap_env.llm import widened
from rap_env.llm.loading import build_tiny_llm, load_llm
from rap_env.mask import PruningMask
from rap_env.widths.prepare import WidthRecipe, prepare_widths
from tests.conftest import TOY_WINDOWS as WINDOWS


@pytest.fixture(scope="module")
def llm():
    return load_llm("tiny", "float32", granularity="group", device="cpu")


def drawn(llm, seed: int = 0) -> torch.Tensor:
    """Widths [2, S] strictly between whole ones."""
    n_parts = WidthGradients(llm, None, TokenBudget()).n_parts
    generator = torch.Generator().manual_seed(seed)
    whole = (torch.rand(len(WINDOWS), len(n_parts), generator=generator, dtype=torch.float64) * n_parts).floor()
    return whole + 0.2 + 0.6 * torch.rand(whole.shape, generator=generator, dtype=torch.float64)


def test_whole_widths_lose_what_the_masked_model_does(llm):
    widths = drawn(llm).floor()
    losses, _slopes = WidthGradients(llm, None, TokenBudget()).measure(WINDOWS, widths)
    for window, own, loss in zip(WINDOWS, widths.int().tolist(), losses.tolist(), strict=True):
        mask = PruningMask.from_widths(llm.shape, own)
        ((_mask, evaluation),) = PerplexityEvaluator(window[None], "text").evaluate_many(llm, [mask])
        assert loss == pytest.approx(-evaluation.score, abs=1e-5)


def test_slopes_are_those_of_small_differences(llm):
    gradients, widths = WidthGradients(llm, None, TokenBudget()), drawn(llm)
    _losses, slopes = gradients.measure(WINDOWS, widths)
    assert slopes.abs().max() > 1e-3
    for site in range(widths.shape[1]):
        step = torch.zeros_like(widths)
        step[:, site] = 0.02
        above, below = (gradients.measure(WINDOWS, widths + sign * step)[0] for sign in (1, -1))
        assert torch.allclose((above - below) / 0.04, slopes[:, site], atol=2e-3, rtol=0.02)


def test_the_last_tokens_alone_can_be_scored(llm):
    gradients, widths = WidthGradients(llm, None, TokenBudget()), drawn(llm)
    n_scored = [3, WINDOWS.shape[1] - 1]
    losses, slopes = gradients.measure(WINDOWS, widths, n_scored)
    whole = gradients.measure(WINDOWS, widths)
    assert losses[1] == whole[0][1] and torch.equal(slopes[1], whole[1][1])
    masks = PruningMask.from_widths(llm.shape, widths[0].floor().int().tolist())
    ((_mask, evaluation),) = PerplexityEvaluator(WINDOWS[:1], "text", 3).evaluate_many(llm, [masks])
    at_whole = gradients.measure(WINDOWS, widths.floor(), n_scored)[0][0]
    assert at_whole.item() == pytest.approx(-evaluation.score, abs=1e-5)
    step = torch.zeros_like(widths)
    step[0, 1] = 0.02
    above, below = (gradients.measure(WINDOWS, widths + sign * step, n_scored)[0][0] for sign in (1, -1))
    assert (above - below).item() / 0.04 == pytest.approx(slopes[0, 1].item(), abs=2e-3, rel=0.02)
    for wrong in ([3], [0, 3], [3, WINDOWS.shape[1]]):
        with pytest.raises(InvalidWorkload, match=r"expected 2 numbers of scored tokens from 1 to 15"):
            gradients.measure(WINDOWS, widths, wrong)


def test_each_window_is_read_at_its_own_widths(llm):
    gradients, widths = WidthGradients(llm, None, TokenBudget()), drawn(llm)
    together, alone = gradients.measure(WINDOWS, widths), gradients.measure(WINDOWS[1:], widths[1:])
    assert all(torch.allclose(both[1:], one, atol=1e-6) for both, one in zip(together, alone, strict=True))


def test_few_windows_at_once_are_the_same(llm, monkeypatch):
    gradients, widths = WidthGradients(llm, None, TokenBudget()), drawn(llm)
    together = gradients.measure(WINDOWS, widths)
    monkeypatch.setattr(width_gradients, "BATCH_TOKENS", 1)
    parted = gradients.measure(WINDOWS, widths)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(together, parted, strict=True))


def test_a_pass_is_paid_for_once_and_kept(llm, tmp_path):
    budget = TokenBudget(PASSES * WINDOWS.numel())
    with ResultStore(tmp_path / "results.db") as store:
        gradients = WidthGradients(llm, store, budget)
        first = gradients.measure(WINDOWS, drawn(llm))
        assert gradients.tokens(WINDOWS) == budget.spent == budget.limit and budget.measured_seconds > 0
        assert all(map(torch.equal, first, gradients.measure(WINDOWS, drawn(llm))))
        with pytest.raises(SearchExhausted):
            gradients.measure(WINDOWS, drawn(llm, seed=1))
        elsewhere = WidthGradients(llm, store, TokenBudget())
        elsewhere._measured = None  # nothing is measured again
        assert all(map(torch.equal, first, elsewhere.measure(WINDOWS, drawn(llm))))


def test_bad_input_is_refused_and_the_model_stays_as_it_was(llm):
    gradients, widths, budget = WidthGradients(llm, None, TokenBudget()), drawn(llm), TokenBudget()
    mask = PruningMask.all_kept(llm.shape).drop("layer0.attention")
    with llm.pruned(mask):
        gradients.measure(WINDOWS, widths)
        assert llm.mask == mask
    dense = llm.logits(llm.run(llm.shape.sites, *llm.open_stream(WINDOWS)))
    for wrong in (widths[:1], widths[:, 1:], widths + 100, -widths, widths * torch.nan):
        with pytest.raises(InvalidMask, match="within the sites' parts"):
            WidthGradients(llm, None, budget).measure(WINDOWS, wrong)
    with pytest.raises(InvalidWorkload, match="token 999"):
        WidthGradients(llm, None, budget).measure(torch.full_like(WINDOWS, 999), widths)
    assert budget.spent == 0
    assert torch.equal(dense, llm.logits(llm.run(llm.shape.sites, *llm.open_stream(WINDOWS))))


@pytest.mark.parametrize("family", ["opt", "qwen2", "qwen3", "mistral"])
def test_other_families_have_gradients_of_whole_sites(family):
    llm = build_tiny_llm(family)
    widths = torch.full((len(WINDOWS), len(llm.shape.components)), 0.5, dtype=torch.float64)
    losses, slopes = WidthGradients(llm, None, TokenBudget()).measure(WINDOWS, widths)
    assert losses.isfinite().all() and (slopes.abs() > 0).all()


def test_by_way_of_float32_gradients_in_bfloat16_are_as_near_to_those_in_float32_as_torchs(llm, monkeypatch):
    rounded, found = load_llm("tiny", "bfloat16", granularity="group", device="cpu"), {}
    exact = WidthGradients(llm, None, TokenBudget()).measure(WINDOWS, drawn(llm))
    for multiplies in (True, False):
        monkeypatch.setattr(widened, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        found[multiplies] = WidthGradients(rounded, None, TokenBudget()).measure(WINDOWS, drawn(llm))
    for torchs, ours, wanted in zip(found[True], found[False], exact, strict=True):
        assert 0 < (ours - wanted).abs().mean() < 1.5 * (torchs - wanted).abs().mean()


def test_matrices_that_are_quantised_or_refitted_are_refused():
    quantised = load_llm("tiny", "float32", weights="int8", granularity="group")
    refitted = load_llm("tiny", "float32", granularity="group")
    prepare_widths(refitted, WINDOWS, WidthRecipe(compensation="bias"))
    for llm in (quantised, refitted):
        with pytest.raises(UnsupportedArchitecture, match="quantised or refitted"):
            WidthGradients(llm, None, TokenBudget())


@pytest.mark.parametrize("n_parts", [1, 3, 8, 9, 24])
def test_gates_add_up_to_the_width_and_are_whole_at_both_ends(n_parts):
    widths = torch.linspace(0, n_parts, 20 * n_parts + 1, dtype=torch.float64)
    gates = soft_gates(widths, n_parts)
    assert torch.allclose(gates.sum(1), widths)
    assert (gates[0] == 0).all() and (gates[-1] == 1).all()
    assert (gates.diff(dim=1) <= 0).all()
