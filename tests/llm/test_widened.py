"""Products of bfloat16 by way of float32 are the exact ones but for a sum in float32 and one rounding."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from rap_env.llm import widened
from rap_env.llm.widened import linears_widened, mm, multiplies_bfloat16, widens

ROUNDOFF = 2.0**-8  # of bfloat16, relative


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """One without instructions for bfloat16, whose tiles are small."""
    monkeypatch.setattr(widened, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(widened, "_TILE_ROWS", 8)
    monkeypatch.setattr(widened, "_TILE_WEIGHTS", 640)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def laid_out(n: int, k: int, layout: str) -> torch.Tensor:
    whole = randn(n + 64, k + 64)
    return {
        "rows": whole[:n, :k].contiguous(),
        "columns": whole[:n, :k].t().contiguous().t(),
        "first rows": whole[:n, :k],
        "first columns": whole.t().contiguous().t()[:, :k],
        "with gaps both ways": whole[:, : 2 * k : 2],
    }[layout]


@pytest.mark.parametrize("rows", [1, 8, 21])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 64), (64, 5), (130, 60)])
@pytest.mark.parametrize("layout", ["rows", "columns", "first rows", "first columns", "with gaps both ways"])
def test_products_are_the_exact_ones_but_for_rounding(rows, n, k, layout):
    weight = laid_out(n, k, layout)
    before, inputs = weight.clone(), randn(rows, weight.shape[1], seed=1)
    exact = inputs.double() @ weight.double().t()
    room = torch.empty(rows, len(weight) + 1, dtype=torch.bfloat16)
    for found in (mm(inputs, weight), mm(inputs, weight, out=room[:, 1:]), room[:, 1:]):
        assert found.dtype == torch.bfloat16 and found.shape == exact.shape
        assert ((found.double() - exact).abs() <= exact.abs() * ROUNDOFF + 1e-5).all()
    assert torch.equal(weight, before)


def test_rows_in_tiles_and_in_threads_give_what_they_give_alone():
    weights, inputs = [randn(96, 40, seed=seed) for seed in range(8)], randn(24, 40, seed=9)
    alone = [torch.cat([mm(tile, weight) for tile in inputs.split(8)]) for weight in weights]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda weight: mm(inputs, weight), weights * 8))
    for found, expected in zip(together, alone * 8, strict=True):
        assert torch.equal(found, expected)


def test_other_types_are_torchs_own():
    for dtype in (torch.float32, torch.float64):
        inputs, weight = randn(5, 40).to(dtype), randn(9, 40, seed=1).to(dtype)
        assert not widens(inputs)
        assert torch.equal(mm(inputs, weight), inputs @ weight.t())
    assert not widens(torch.empty(1, dtype=torch.bfloat16, device="meta"))
    assert widens(randn(1))


@pytest.mark.parametrize(
    ("machine", "instructions", "expected"),
    [("x86_64", (), False), ("AMD64", ("avx512_bf16",), True), ("x86_64", ("amx_tile",), True), ("arm64", (), True)],
)
def test_processors_with_instructions_for_bfloat16_use_them(machine, instructions, expected, monkeypatch):
    monkeypatch.setattr(widened.platform, "machine", lambda: machine)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions)
    assert multiplies_bfloat16.__wrapped__() is expected


def test_gradients_are_torchs_own():
    inputs, weight = randn(5, 40).requires_grad_(), randn(9, 40, seed=1)
    mm(inputs, weight).sum().backward()
    assert torch.equal(inputs.grad, weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "first rows"])
def test_upstreams_linear_layers_and_their_gradients_are_exact_but_for_rounding(biased, layout, monkeypatch):
    calls, product = [], widened.widened
    monkeypatch.setattr(widened, "widened", lambda *given: calls.append(given) or product(*given))
    layer = nn.Linear(1, 1, device="meta")
    layer.weight = nn.Parameter(laid_out(130, 60, layout), requires_grad=False)
    layer.bias = nn.Parameter(randn(130, seed=2), requires_grad=False) if biased else None
    inputs, slopes = randn(3, 7, 60, seed=1).requires_grad_(), randn(3, 7, 130, seed=3)
    with linears_widened(inputs):
        found = layer(inputs)
    found.backward(slopes)
    wide = inputs.detach().double().requires_grad_()
    exact = functional.linear(wide, layer.weight.double(), layer.bias.double() if biased else None)
    exact.backward(slopes.double())
    assert len(calls) == 1
    for one, other in ((found, exact), (inputs.grad, wide.grad)):
        assert one.dtype == torch.bfloat16 and one.shape == other.shape
        assert ((one.double() - other).abs() <= other.abs() * ROUNDOFF + 1e-5).all()


def test_few_rows_matrices_that_learn_and_other_processors_are_torchs_own(monkeypatch):
    layer = nn.Linear(40, 9, dtype=torch.bfloat16)
    with linears_widened(layer.weight):
        layer(randn(5, 40)).sum().backward()
    assert torch.equal(layer.weight.grad, randn(5, 40).sum(0).expand(9, -1))
    monkeypatch.setattr(widened, "widened", None)  # a call of it fails
    layer.requires_grad_(False)
    with linears_widened(layer.weight):
        assert torch.equal(layer(randn(3, 40)), functional.linear(randn(3, 40), layer.weight, layer.bias))
    monkeypatch.setattr(widened, "multiplies_bfloat16", lambda: True)
    with linears_widened(layer.weight):
        assert torch.equal(layer(randn(5, 40)), functional.linear(randn(5, 40), layer.weight, layer.bias))
