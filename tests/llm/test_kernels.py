"""Norms and rotary positions give upstream's bits; fused products round once instead of three times."""

import timeit

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rap_env.calibration.corpus import packaged_corpus
from rap_env.calibration.sampling import consecutive_windows
from rap_env.llm import few_rows, widened
from rap_env.llm.kernels import added, gated, hooked, product, rms_norm, rotated
from rap_env.llm.loading import build_random_llm
from rap_env.llm.packing import TokenTree
from tests.llm.few_rows_kernels import KERNELS, Kernels
from tests.llm.test_parts import SIZES

TYPES = (torch.float32, torch.bfloat16, torch.float16)


FUSES = torch.backends.cpu.get_cpu_capability() == "AVX512"  # oneDNN has no such products, or coarser ones, elsewhere
WITH = pytest.param(True, marks=pytest.mark.skipif(not FUSES, reason="no such CPU"), id="with bfloat16")


@pytest.fixture(params=[WITH, pytest.param(False, id="without bfloat16")])
def processor(request, monkeypatch):
    """Both ways, whatever instructions the processor has; each is right on any."""
    monkeypatch.setattr(widened, "multiplies_bfloat16", lambda: request.param)


def states(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(n_inputs: int, n_outputs: int, bias: bool, seed: int = 0) -> nn.Linear:
    made = nn.Linear(n_inputs, n_outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    made.weight.copy_(states(n_outputs, n_inputs, seed=seed) / n_inputs**0.5)
    if bias:
        made.bias.copy_(states(n_outputs, seed=seed + 1))
    return made


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_rms_norm_has_the_bits_of_upstreams_whatever_the_tiles(dtype):
    norm = LlamaRMSNorm(576, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(states(576, dtype=dtype))
    for shape in ((1, 1, 576), (2, 700, 576), (3, 576)):
        hidden = states(*shape, dtype=dtype, seed=1)
        before = hidden.clone()
        assert torch.equal(rms_norm(norm, hidden), norm(hidden))
        assert torch.equal(hidden, before)
    view = states(2, 64, 600, dtype=dtype)[:, 5:, 24:]
    assert torch.equal(rms_norm(norm, view), norm(view))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("compiled", [pytest.param(Kernels(None, False), id="none"), *KERNELS[:2]])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [6, 64, 80])
def test_rotary_positions_have_the_bits_of_upstreams(dtype, compiled, batch, channels, monkeypatch):
    monkeypatch.setattr(few_rows, "_few_rows", compiled.module)
    query, key = states(batch, 33, 9, channels, dtype=dtype), states(batch, 33, 12, channels, dtype=dtype, seed=1)
    key = key[:, :, 4:7]  # with gaps
    query[0, 3, 1, :3] = torch.tensor([torch.nan, torch.inf, -torch.nan])
    angles = states(1, 33, channels // 2, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    for one, wanted in zip((query, key), expected, strict=True):
        before = one.clone()
        found = rotated(one, cos[:, :, None], sin[:, :, None]).transpose(1, 2)
        for same, exactly in ((found, wanted), (one, before)):
            torch.testing.assert_close(same, exactly, rtol=0, atol=0, equal_nan=True)


def test_rotary_positions_learn():
    learned, angles = states(1, 5, 3, 64).requires_grad_(), states(1, 5, 1, 64)
    rotated(learned, angles.cos(), angles.sin()).sum().backward()
    assert learned.grad.abs().sum() > 0


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [4, 9, 700])
def test_fused_products_lie_nearer_to_the_exact_ones_than_separate_operations(rows, bias):
    gate, up, down = linear(96, 160, bias, 1), linear(96, 160, bias, 3), linear(160, 96, bias, 5)
    inputs, residual = states(rows, 96, seed=7), states(rows, 96, seed=8)
    opened = gated(gate, up, nn.SiLU(), inputs)
    separate = nn.functional.silu(gate(inputs)) * up(inputs)
    exact = [module.double()(inputs.double()) for module in (gate, up)]
    exact = nn.functional.silu(exact[0]) * exact[1]
    assert (opened - exact).abs().mean() <= (separate - exact).abs().mean()
    torch.testing.assert_close(opened.double(), exact, rtol=2**-7, atol=2**-7)
    summed = added(down, opened, residual)
    exact = residual.double() + down.double()(opened.double())
    torch.testing.assert_close(summed.double(), exact, rtol=2**-8, atol=2**-9)
    assert torch.equal(residual, states(rows, 96, seed=8))


@pytest.mark.usefixtures("processor")
def test_a_row_or_two_run_as_separate_operations():
    gate, up, down = linear(96, 160, False, 1), linear(96, 160, False, 3), linear(160, 96, False, 5)
    inputs, residual = states(3, 96, seed=7), states(3, 96, seed=8)
    opened = nn.functional.silu(gate(inputs)) * up(inputs)
    assert torch.equal(gated(gate, up, nn.SiLU(), inputs), opened)
    assert torch.equal(added(down, opened, residual), residual + down(opened))


@pytest.mark.usefixtures("processor")
def test_views_of_a_matrix_give_what_copies_of_them_give():
    whole, inputs, residual = linear(192, 96, False), states(3, 20, 128), states(3, 20, 96, seed=1)
    for laid_out in (whole.weight, whole.weight.t().contiguous().t()):  # output matrices are stored by columns
        view, copied = (nn.Linear(128, 96, bias=False, dtype=torch.bfloat16) for _ in range(2))
        view.weight, copied.weight = (
            nn.Parameter(weight, requires_grad=False) for weight in (laid_out[:, :128], laid_out[:, :128].contiguous())
        )
        assert torch.equal(added(view, inputs, residual), added(copied, inputs, residual))


def test_products_are_made_of_matrices_without_gaps():
    """OneDNN takes columns of a matrix that lies by rows too, but by a loop, a thousand times slower."""
    whole, inputs, residual = linear(1536, 576, False), states(256, 1472), states(256, 576, seed=1)
    view = nn.Linear(1472, 576, bias=False, dtype=torch.bfloat16)
    view.weight = nn.Parameter(whole.weight[:, :1472], requires_grad=False)
    ways = {"fused": lambda: added(view, inputs, residual), "separate": lambda: residual + view(inputs)}
    seconds = {name: min(timeit.repeat(way, number=1, repeat=3)) for name, way in ways.items()}
    assert seconds["fused"] < 20 * seconds["separate"]


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_by_way_of_float32_is_the_exact_one_but_for_rounding(bias, monkeypatch):
    monkeypatch.setattr(widened, "multiplies_bfloat16", lambda: False)
    layer, inputs = linear(96, 160, bias), states(3, 20, 96, seed=7)
    found, exact = product(layer, inputs), layer.double()(inputs.double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.usefixtures("processor")
def test_what_learns_runs_as_upstreams_does():
    norm, down = LlamaRMSNorm(96), nn.Linear(160, 96, dtype=torch.bfloat16)
    rms_norm(norm, states(2, 96, dtype=torch.float32)).sum().backward()
    inputs = states(5, 160)
    (added(down, inputs, states(5, 96)) + product(down, inputs)).sum().backward()
    assert norm.weight.grad is not None and down.weight.grad is not None


def test_a_module_with_hooks_is_called():
    down, seen = linear(160, 96, False), []
    inputs, residual = states(2, 160), states(2, 96, seed=1)
    for register in (down.register_forward_pre_hook, down.register_forward_hook):
        handle = register(lambda *call: seen.append(call))
        assert torch.equal(added(down, inputs, residual), residual + down(inputs))
        handle.remove()
    assert len(seen) == 4


@pytest.mark.slow
def test_in_bfloat16_tokens_are_as_near_to_float32_as_upstreams(embedded_llm, embedded_llm_float32):
    text = "".join(packaged_corpus().documents)
    tokens = consecutive_windows(text, embedded_llm.tokenizer, tokens_per_sample=256, limit=4)

    def log_likelihoods(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None]).flatten()

    exact = log_likelihoods(embedded_llm_float32.model(tokens).logits)
    upstreams = (log_likelihoods(embedded_llm.model(tokens).logits) - exact).abs()
    trees = [TokenTree(tuple(row)) for row in tokens.tolist()]
    for stream, context, *_ in (embedded_llm.open_stream(tokens), embedded_llm.open_packed(trees)):
        logits = embedded_llm.logits(embedded_llm.run(embedded_llm.shape.sites, stream, context))
        ours = (log_likelihoods(logits.view(*tokens.shape, -1)) - exact).abs()
        assert ours.mean() < 0.05
        assert ours.mean() < 1.1 * upstreams.mean()


def test_a_head_with_our_own_hook_counts_as_unseen():
    llm = build_random_llm("llama", SIZES, dtype="bfloat16")
    head = llm.model.lm_head
    assert head._forward_pre_hooks and not hooked(head)
    handle = head.register_forward_pre_hook(lambda *call: None)
    assert hooked(head)
    handle.remove()
    assert not hooked(head)
