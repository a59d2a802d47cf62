"""Kernels for decoding: products of a few rows, and attention of one token."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from rap_env.llm import few_rows, parts
from rap_env.llm import live as live_module
from rap_env.llm.few_rows import FewRows, attend, for_few_rows, most_rows
from rap_env.llm.formats import quantise
from rap_env.llm.int8_cache import encoded
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_random_llm
from rap_env.llm.quantised import Int8Linear
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from tests.llm.test_live_cache import FULL
from tests.llm.test_parts import GROUP, MEMBERS, SIZES

pytest.importorskip("rap_env.llm._few_rows", reason="built without a C compiler")
ROUNDOFF = 2.0**-8  # of bfloat16, relative
ROWS = (1, 2, 3, 4, 5, 16, 31)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not few_rows._PAIRS, reason="no such CPU"))])
def pairs(request, monkeypatch) -> bool:
    """Whether pairs of bfloat16 numbers are multiplied at once."""
    monkeypatch.setattr(few_rows, "_PAIRS", request.param)
    return request.param


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


@pytest.mark.usefixtures("pairs")
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


@pytest.mark.usefixtures("pairs")
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


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_bias_is_added_before_rounding(by_columns):
    weight, bias, inputs = randn(97, 64), randn(97, seed=2), randn(2, 64, seed=1)
    exact = inputs.double() @ weight.double().T + bias.double()
    weight = weight.t().contiguous().t() if by_columns else weight
    assert_rounded(for_few_rows(linear(weight, bias))(inputs), exact)


def test_matrices_with_gaps_both_ways_are_upstreams():
    inputs, gaps = randn(1, 64, seed=1), randn(128, 128)[::2, ::2]
    assert torch.equal(for_few_rows(linear(gaps))(inputs), functional.linear(inputs, gaps))


@pytest.mark.usefixtures("pairs")
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


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 3), (2, 7)])
@pytest.mark.parametrize("tokens", [1, 2, 65, 300])
@pytest.mark.parametrize("channels", [64, 80])
def test_attention_of_one_token_is_that_in_float64_but_for_rounding(heads, group, tokens, channels):
    query = 3 * randn(1, heads * group, channels)
    cache = randn(2, heads, tokens + 7, channels, seed=1)
    for scale in (None, 0.3):
        exact = exactly_read(query[0], cache[:, :, :tokens], scale)
        assert_rounded(attend(query, [(cache, tokens - 1)], None, scale)[0], exact)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("tokens", [1, 65])
@pytest.mark.parametrize("channels", [6, 64, 80])
def test_attention_to_an_int8_cache_reads_its_codes(tokens, channels):
    query, cache = 3 * randn(1, 6, channels), encoded(randn(2, 2, tokens + 7, channels, seed=1))
    codes = cache[:, :, :tokens]
    scales = codes[..., channels:].contiguous().view(torch.bfloat16)
    exact = exactly_read(query[0], codes[..., :channels].double() * scales.double())
    assert_rounded(attend(query, [(cache, tokens - 1)], None, None)[0], exact)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("int8", [False, True])
def test_each_sequence_reads_its_own_cache_into_which_the_new_token_is_written(int8):
    lengths, query, new = (4, 0, 70), 3 * randn(3, 6, 64), randn(2, 2, 3, 64, seed=9)
    form = encoded if int8 else torch.clone
    before = [form(randn(2, 2, length + 3, 64, seed=length)) for length in lengths]
    after = [cache.clone() for cache in before]
    read = attend(query, list(zip(after, lengths, strict=True)), form(new), None)
    for row, length in enumerate(lengths):
        before[row][:, :, length] = form(new)[:, :, row]
        assert torch.equal(after[row], before[row])
        assert torch.equal(read[row], attend(query[row : row + 1], [(after[row], length)], None, None)[0])


def test_weights_of_attention_sum_to_1_whatever_the_scores_are():
    for scale in (1e-6, 1.0, 1e3, 1e6):
        cache = torch.ones(2, 1, 200, 64, dtype=torch.bfloat16)
        cache[0] = randn(1, 200, 64)
        assert torch.equal(attend(3 * randn(1, 5, 64), [(cache, 199)], None, scale), torch.ones(1, 5, 64).bfloat16())


def test_they_are_for_bfloat16_on_a_cpu_with_long_vectors_and_few_threads(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(few_rows, "_QUICK", True)
    for pairs, expected in ((True, {1: 32, 2: 16, 3: 0}), (False, {1: 4, 2: 4, 3: 0})):
        monkeypatch.setattr(few_rows, "_PAIRS", pairs)
        for n_threads, rows in expected.items():
            monkeypatch.setattr(torch, "get_num_threads", lambda n_threads=n_threads: n_threads)
            assert most_rows(cpu, torch.bfloat16) == rows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert most_rows(cpu, torch.float32) == most_rows(torch.device("cuda"), torch.bfloat16) == 0
    for name, value in (("_QUICK", False), ("_few_rows", None)):
        with monkeypatch.context() as without:
            without.setattr(few_rows, name, value)
            assert most_rows(cpu, torch.bfloat16) == 0


def logits_of_steps(live: LiveModel) -> torch.Tensor:
    """Of two sequences: a prompt of each, two tokens more, and with a narrower mask one of the second."""
    caches = [live.new_cache(16), live.new_cache(16)]
    steps = [live.read([(caches[0], range(3, 12)), (caches[1], [7])])]
    for token in (5, 6):
        steps.append(live.read([(cache, [token]) for cache in caches]))
    live.switch(PruningMask.from_widths(live.llm.shape, [1] * len(live.llm.shape.sites)))
    caches[1].switch(live.heads)
    steps.append(live.read([(caches[1], [9])]))
    return torch.cat(steps).double()


@pytest.mark.parametrize("member", FULL)
@pytest.mark.parametrize(("stored", "numbers"), [(False, "full"), (True, "full"), (False, "int8"), (True, "int8")])
def test_a_live_model_decodes_with_them_and_rounds_about_as_torch_does(member, stored, numbers, monkeypatch, tmp_path):
    monkeypatch.setattr(few_rows, "_QUICK", True)
    monkeypatch.setattr(parts, "GROUP_CHANNELS", GROUP)
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))
    plain, found = build_random_llm(*MEMBERS[member], dtype="bfloat16"), {}
    n_matrices = sum(isinstance(module, nn.Linear) for module in plain.model.modules())
    exact = quantise(copy.deepcopy(plain.model).float(), numbers, numbers)
    rounded = quantise(plain.model, numbers, numbers)
    calls, kernels = Counter(), few_rows._few_rows
    counted = SimpleNamespace(
        product=lambda *given: (calls.update(["product"]), kernels.product(*given)),
        attend=lambda *given: (calls.update(["attend"]), kernels.attend(*given)),
    )
    for name, model, ours in (("float32", exact, None), ("torch", rounded, None), ("kernels", rounded, counted)):
        monkeypatch.setattr(few_rows, "_few_rows", ours)
        llm = SwitchableLLM(model, plain.tokenizer, "few", "group")
        if stored:
            WeightStore(llm)
        found[name] = logits_of_steps(LiveModel(llm))
        llm.weights_changed()
    errors = {name: (found[name] - found["float32"]).abs().mean() for name in ("torch", "kernels")}
    assert 0 < errors["kernels"] < 1.5 * errors["torch"]
    n_products = 4 * n_matrices if few_rows._PAIRS else 1 + 3 * n_matrices  # of a prompt of 10 rows only the head
    assert calls == {"product": n_products, "attend": 4 * plain.model.config.num_hidden_layers}


@pytest.mark.parametrize(
    ("most", "expected"), [(32, [1, 4, 5, 16, 17, 31, 32, 64]), (4, [1, 4, 16, 16, 32, 32, 32, 64])]
)
def test_no_rows_are_filled_up_where_they_have_a_kernel(most, expected, monkeypatch):
    monkeypatch.setattr(live_module, "most_rows", lambda _device, _dtype: most)
    live, rows = LiveModel(build_random_llm("llama", SIZES, dtype="bfloat16")), []
    forward = live._forward
    monkeypatch.setattr(
        live, "_forward", lambda inputs, stream: rows.append(inputs.shape[1]) or forward(inputs, stream)
    )
    for n_tokens in (1, 4, 5, 16, 17, 31, 32, 33):
        live.read([(live.new_cache(n_tokens), [3] * n_tokens)])
    assert rows == expected


@pytest.mark.parametrize(
    ("most", "expected"), [(32, [1, 32, 64, 128]), (4, [1, 4, 16, 32, 64, 128]), (0, [1, 4, 16, 64, 128])]
)
def test_warming_up_reads_once_in_each_number_of_rows_with_a_program(most, expected, monkeypatch):
    monkeypatch.setattr(live_module, "most_rows", lambda _device, _dtype: most)
    live, rows = LiveModel(build_random_llm("llama", SIZES, dtype="bfloat16")), []
    forward, mask = live._forward, live.llm.mask
    monkeypatch.setattr(
        live, "_forward", lambda inputs, stream: rows.append(inputs.shape[1]) or forward(inputs, stream)
    )
    live.warm_up(100, [], 120)
    prompts, longest, next_tokens = rows[: len(expected)], rows[len(expected)], rows[len(expected) + 1 :]
    assert prompts == expected and longest == 128
    assert next_tokens == [size for size in expected if size in live._few_rows and size >= most]
    assert live.llm.mask == mask
