"""Kernels for decoding: products of a few rows, attention of one token, and norms."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rap_env.llm import few_rows
from rap_env.llm.few_rows import FewRows, attend, for_few_rows
from rap_env.llm.int8_cache import encoded
from rap_env.llm.kernels import rms_norm
from rap_env.llm.quantised import Int8Linear
from tests.llm.few_rows_kernels import KERNELS

ROUNDOFF = 2.0**-8  # of bfloat16, relative
ROWS = (1, 2, 3, 4, 5, 16, 31)


@pytest.fixture(autouse=True, params=KERNELS)
def kernels(request, monkeypatch) -> None:
    """Those of each processor."""
    monkeypatch.setattr(few_rows, "_few_rows", request.param.module)
    monkeypatch.setattr(few_rows, "_PAIRS", request.param.pairs)


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    made = nn.Linear(1, 1, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Each value lies within a rounding to bfloat16 of the exact one, and of a sum in float32."""
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * ROUNDOFF + 1e-5).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 64), (64, 5), (130, 200), (700, 192)])
@pytest.mark.parametrize("layout", ["rows", "columns", "first rows", "first columns", "columns of rows"])
def test_products_are_those_of_upstream_but_for_rounding(rows, n, k, layout):
    whole = randn(n + 64, k + 64)
    by_columns = whole.t().contiguous().t()
    weight = {
        "rows": whole[:n, :k].contiguous(),
        "columns": whole[:n, :k].t().contiguous().t(),
        "first rows": whole[:n, : k + 64],
        "first columns": by_columns[:, :k],
        "columns of rows": whole[:n, 64:],
    }[layout]
    inputs = randn(1, rows, weight.shape[1], seed=1)
    found = for_few_rows(linear(weight))(inputs)
    assert found.shape == (1, rows, len(weight))
    assert_rounded(found, inputs.double() @ weight.double().T)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 64), (64, 5), (130, 200), (700, 192)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_with_int8_are_summed_before_they_are_rounded(rows, n, k, biased):
    layer = Int8Linear(randn(n, k + 64), randn(n, seed=2) if biased else None)
    inputs, parts = randn(rows, k, seed=1), layer.cut(1, slice(64, k + 64))["weight"]
    exact = inputs.double() @ (parts.double() * layer.scales.double()[:, None]).T
    few = for_few_rows(Int8Linear(parts, layer.bias, layer.scales))
    assert_rounded(few(inputs), exact + layer.bias.double() if biased else exact)
    assert few.weight.data_ptr() == parts.data_ptr()  # read as it lies, with gaps between its rows


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_bias_is_added_before_rounding(by_columns):
    weight, bias, inputs = randn(97, 64), randn(97, seed=2), randn(2, 64, seed=1)
    exact = inputs.double() @ weight.double().T + bias.double()
    weight = weight.t().contiguous().t() if by_columns else weight
    assert_rounded(for_few_rows(linear(weight, bias))(inputs), exact)


def test_matrices_with_gaps_both_ways_are_upstreams():
    inputs, gaps = randn(1, 64, seed=1), randn(128, 128)[::2, ::2]
    assert torch.equal(for_few_rows(linear(gaps))(inputs), functional.linear(inputs, gaps))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("by_columns", [False, True])
def test_what_is_not_finite_stays_so(rows, by_columns):
    weight, inputs = randn(4, 65), randn(rows, 65, seed=1)
    weight[1, 3], weight[2, 64], inputs[0, 3:6], inputs[0, 64] = torch.inf, torch.nan, 1.0, 1.0
    weight = weight.t().contiguous().t() if by_columns else weight
    found = for_few_rows(linear(weight))(inputs)[0]
    assert found.isfinite().tolist() == [True, False, False, True]
    assert found[1] == torch.inf
    assert found[2].isnan()


@pytest.mark.parametrize("shape", [(1, 1, 576), (1, 31, 576), (2, 3, 7, 80), (4, 5)])
def test_a_norm_rounds_where_upstreams_does(shape):
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).bfloat16().requires_grad_(False)
    norm.weight.copy_(randn(shape[-1]))
    hidden = 30 * randn(*shape, seed=1)
    few, expected = for_few_rows(norm), norm(hidden)
    found = few(hidden.transpose(0, 1).contiguous().transpose(0, 1))
    assert few.weight is norm.weight and rms_norm(few, hidden).equal(found)
    # Sums in another order: a scale may differ in the last bit of float32, and one number in 2^15 rounds otherwise.
    assert (found != expected).float().mean() < 0.01
    assert (found.double() - expected.double()).abs().max() <= 2 * ROUNDOFF * expected.abs().max()


def test_a_norm_of_nothing_is_nothing_and_what_is_not_finite_stays_so():
    few = for_few_rows(LlamaRMSNorm(64).bfloat16().requires_grad_(False))
    hidden = randn(3, 64)
    hidden[0], hidden[1, 5] = 0, torch.nan
    assert few(hidden)[0].equal(torch.zeros(64).bfloat16())
    assert few(hidden).isnan().all(1).tolist() == [False, True, False]


def test_the_layer_has_the_weights_of_the_other_and_follows_them():
    plain = linear(randn(96, 64))
    made, inputs = for_few_rows(plain), randn(1, 64, seed=1)
    before = made(inputs)
    plain.weight.mul_(2)
    assert torch.equal(made(inputs), 2 * before)
    assert type(plain) is nn.Linear


def test_what_is_no_plain_layer_of_bfloat16_stays_as_it_is():
    others = (nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float16), nn.ReLU(), Int8Linear(torch.ones(4, 4)))
    for module in (*others, FewRows(4, 4).bfloat16()):
        assert for_few_rows(module) is module


def exactly_read(query: torch.Tensor, states: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """What a token [hq, D] reads of keys and values [2, h, T, D], in float64."""
    repeated = states.double().repeat_interleave(len(query) // states.shape[1], 1)
    return functional.scaled_dot_product_attention(query.double()[:, None], *repeated, scale=scale)[:, 0]


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 3), (2, 7)])
@pytest.mark.parametrize("tokens", [1, 2, 65, 300])
@pytest.mark.parametrize("channels", [64, 80])
def test_attention_of_one_token_is_that_in_float64_but_for_rounding(heads, group, tokens, channels):
    query = 3 * randn(1, heads * group, channels)
    cache = randn(2, heads, tokens + 7, channels, seed=1)
    for scale in (None, 0.3):
        exact = exactly_read(query[0], cache[:, :, :tokens], scale)
        assert_rounded(attend(query, [(cache, tokens - 1)], None, scale)[0], exact)


@pytest.mark.parametrize("tokens", [1, 65])
@pytest.mark.parametrize("channels", [6, 64, 80])
def test_attention_to_an_int8_cache_reads_its_codes(tokens, channels):
    query, cache = 3 * randn(1, 6, channels), encoded(randn(2, 2, tokens + 7, channels, seed=1))
    codes = cache[:, :, :tokens]
    scales = codes[..., channels:].contiguous().view(torch.bfloat16)
    exact = exactly_read(query[0], codes[..., :channels].double() * scales.double())
    assert_rounded(attend(query, [(cache, tokens - 1)], None, None)[0], exact)


@pytest.mark.parametrize("int8", [False, True])
def test_each_sequence_reads_its_own_cache_into_which_the_new_token_is_written(int8):
    lengths, query, new = (4, 0, 70), 3 * randn(3, 6, 64), randn(2, 2, 3, 64, seed=9)
    form = encoded if int8 else torch.clone
    before = [form(randn(2, 2, length + 3, 64, seed=length)) for length in lengths]
    after = [cache.clone() for cache in before]
    new[:, :, 1] *= 100
    new[0, 1, 2] = 0
    read = attend(query, list(zip(after, lengths, strict=True)), new, None)
    for row, length in enumerate(lengths):
        before[row][:, :, length] = form(new)[:, :, row]
        assert torch.equal(after[row], before[row])
        assert torch.equal(read[row], attend(query[row : row + 1], [(after[row], length)], None, None)[0])


@pytest.mark.parametrize("channels", [6, 64, 128])
def test_new_keys_and_values_have_the_codes_of_the_int8_cache(channels):
    spread = torch.logspace(-45, 38, 400, base=10.0, dtype=torch.float64)[:, None]
    new = (spread * randn(400, channels).double()).bfloat16().expand(2, 1, -1, -1)
    caches = [torch.zeros(2, 1, 1, channels + 2, dtype=torch.int8) for _ in range(400)]
    attend(torch.zeros(400, 1, channels).bfloat16(), [(cache, 0) for cache in caches], new, None)
    assert torch.cat(caches, 2).equal(encoded(new))


def test_keys_and_values_that_are_not_finite_read_as_nothing_finite():
    new = randn(2, 1, 3, 64)
    new[1, 0, 0, 5], new[1, 0, 1, 7] = torch.nan, torch.inf
    caches = [torch.zeros(2, 1, 1, 66, dtype=torch.int8) for _ in range(3)]
    read = attend(randn(3, 1, 64), [(cache, 0) for cache in caches], new, None)
    assert [row.isfinite().all().item() for row in read] == [False, False, True]


def test_weights_of_attention_sum_to_1_whatever_the_scores_are():
    for scale in (1e-6, 1.0, 1e3, 1e6):
        cache = torch.ones(2, 1, 200, 64, dtype=torch.bfloat16)
        cache[0] = randn(1, 200, 64)
        assert torch.equal(attend(3 * randn(1, 5, 64), [(cache, 199)], None, scale), torch.ones(1, 5, 64).bfloat16())
