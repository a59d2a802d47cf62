"""Quantised layers compute with the numbers that they hold, by either way, on any CPU and in any thread."""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rap_env.llm import int4, quantised
from rap_env.llm.int4 import Int4Linear
from rap_env.llm.quantised import Int8Embedding, Int8Linear
from tests.llm.quantised_cases import numbers_of

LAYERS = {"int8": Int8Linear, "int4": Int4Linear, "int4g32": functools.partial(Int4Linear, group=32)}


def random_matrix(n_outputs: int, n_inputs: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_outputs, n_inputs, generator=generator).to(dtype)


def test_int8_scales_are_a_127th_of_each_rows_largest_weight():
    weight = torch.tensor([[1.0, -12.7, 0.26, 0.0], [0.0, 0.0, 0.0, 0.0]])
    linear = Int8Linear(weight)
    assert linear.weight.tolist() == [[10, -127, 3, 0], [0, 0, 0, 0]]  # 0.26 / 0.1 = 2.6
    assert linear.scales[0].item() == pytest.approx(0.1)
    assert torch.isfinite(linear(torch.ones(3, 4))).all()


@pytest.mark.parametrize("group", [32, 64])
def test_int4_weights_on_a_grid_of_16_steps_stay_as_they_are(group):
    numbers = torch.randint(0, 16, (64, 128), generator=torch.Generator().manual_seed(0)).float()
    numbers[:, ::group], numbers[:, 1::group] = 0, 15  # so that every group reaches over its grid
    starts = torch.arange(64 * 128 // group).view(64, -1, 1).expand(-1, -1, group).reshape(64, 128)
    weight = 0.5 * numbers - starts % 7
    linear = Int4Linear(weight, group=group)
    assert linear.scales.shape == (128 // group, 64, 2) and linear.group == group
    torch.testing.assert_close(numbers_of(linear), weight.double(), rtol=0, atol=1e-5)
    scale, zero = linear.scales[0, 0].tolist()
    assert (scale, zero) == (pytest.approx(0.5), pytest.approx(0.5 * 8))  # numbers are held less 8


def test_int4_grids_are_fitted_to_their_numbers(monkeypatch):
    weight = random_matrix(64, 256)

    def error() -> float:
        return (numbers_of(Int4Linear(weight)) - weight).square().mean().item()

    fitted = error()
    monkeypatch.setattr(int4, "_FITS", 0)
    step = (weight.view(64, 4, 64).amax(-1) - weight.view(64, 4, 64).amin(-1)) / 15
    assert error() == pytest.approx(step.square().mean().item() / 12, rel=0.05)  # a step's uniform error
    assert fitted < 0.9 * error()


def test_int4_of_equal_weights_is_finite_and_near_them():
    weight = torch.cat([torch.full((64, 64), 0.3), torch.zeros(64, 64)], 1).to(torch.bfloat16)
    torch.testing.assert_close(numbers_of(Int4Linear(weight)), weight.double(), rtol=0.01, atol=1e-30)


def test_int4_weights_lie_as_torchs_own_conversion_lays_them():
    linear = Int4Linear(random_matrix(192, 128))
    if not linear._has_kernel():
        pytest.skip("this CPU's kernel has another layout; its products are dequantised")
    scales, zeros = linear.scales.double().repeat_interleave(64, 0).permute(2, 1, 0)
    numbers = ((numbers_of(linear) - zeros) / scales).round() + 8
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
    assert torch.equal(expected.flatten(), linear.weight.flatten())


@pytest.mark.parametrize("rows", [1, 24, 25, 70])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_products_are_those_of_the_numbers_whatever_the_rows(kind, bias, rows, monkeypatch):
    monkeypatch.setattr(quantised, "_TILE", 64 * 128)  # three tiles
    linear = LAYERS[kind](random_matrix(192, 128), torch.linspace(-9, 9, 192) if bias else None)
    inputs = random_matrix(rows, 128, seed=1)
    expected = inputs.double() @ numbers_of(linear).T + (torch.linspace(-9, 9, 192).double() if bias else 0)
    torch.testing.assert_close(linear(inputs[None])[0].double(), expected, rtol=0, atol=1e-4)
    strided = torch.stack([inputs, inputs], -1)[..., 0]
    torch.testing.assert_close(linear(strided).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_round_about_as_much_as_a_plain_layer_does(kind, dtype, monkeypatch):
    linear = LAYERS[kind](random_matrix(512, 576, dtype))
    inputs, numbers = random_matrix(20, 576, dtype, seed=1), numbers_of(linear)
    expected = inputs.double() @ numbers.T

    def error(outputs: torch.Tensor) -> float:
        return (outputs.double() - expected).square().mean().sqrt().item()

    plain = error(torch.nn.functional.linear(inputs, numbers.to(dtype)))
    few = error(linear(inputs))
    monkeypatch.setattr(quantised, "KERNEL_ROWS", 0)
    many = error(linear(inputs))
    assert few < 1.1 * plain and many < 1.1 * plain
    assert plain > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_few_rows_run_on_the_kernel_and_more_on_tiles(kind, monkeypatch):
    linear, ways = LAYERS[kind](random_matrix(64, 64)), []
    for way in ("_by_kernel", "_by_tiles"):
        monkeypatch.setattr(linear, way, lambda rows, way=way: ways.append(way) or torch.zeros(len(rows), 64))
    for rows in (1, 24, 25):
        linear(torch.zeros(rows, 64))
    has_kernel = "_by_kernel" if linear._has_kernel() else "_by_tiles"
    assert ways == [has_kernel, has_kernel, "_by_tiles"]


@pytest.mark.parametrize("n_inputs", [17, 40, 48])
def test_sizes_that_the_int8_kernel_reads_beyond_are_computed_without_it(n_inputs):
    linear = Int8Linear(random_matrix(5, n_inputs, torch.bfloat16))  # torch 2.13 crashed with 17, and said NaN with 40
    inputs = random_matrix(3, n_inputs, torch.bfloat16, seed=1)
    expected = inputs.double() @ numbers_of(linear).T
    torch.testing.assert_close(linear(inputs).double(), expected, rtol=0.02, atol=0.05)


def test_an_embeddings_rows_are_those_of_the_head_that_shares_its_matrix():
    rows = Int8Embedding(random_matrix(257, 64))
    head = Int8Linear(rows.weight, None, rows.scales)
    found = rows(torch.tensor([[3, 256]]))
    torch.testing.assert_close(found[0].double(), numbers_of(head)[[3, 256]])
    assert head.weight.data_ptr() == rows.weight.data_ptr()


@pytest.mark.parametrize("kind", LAYERS)
def test_threads_do_not_share_a_buffer(kind):
    linears = [LAYERS[kind](random_matrix(256, 256, seed=seed)) for seed in range(4)]
    inputs = random_matrix(64, 256, seed=9)
    alone = [linear(inputs) for linear in linears]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda linear: [linear(inputs) for _ in range(30)], linears))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(expected, one) for one in found)


def test_a_buffer_made_in_inference_mode_can_be_used_outside_of_it():
    linear, inputs = Int8Linear(random_matrix(64, 64, torch.float64)), random_matrix(30, 64, torch.float64, 1)
    with torch.inference_mode():
        inside = linear(inputs)
    assert torch.equal(linear(inputs), inside)


SCRIPT = """
import torch
from rap_env.llm.int4 import Int4Linear, int4_layout
from tests.llm.quantised_cases import numbers_of
linear = Int4Linear(torch.randn(192, 128, generator=torch.Generator().manual_seed(0)))
inputs = torch.randn(30, 128, generator=torch.Generator().manual_seed(1))
expected = inputs.double() @ numbers_of(linear).T
for rows in (3, 30):
    assert (linear(inputs[:rows]).double() - expected[:rows]).abs().max() < 1e-4
for part in (slice(64, 192), torch.cat([torch.arange(64), torch.arange(128, 192)])):
    cut = Int4Linear(torch.zeros(64, 64))
    cut._keep(**linear.cut(0, part))
    for rows in (3, 30):
        assert (cut(inputs[:rows]).double() - expected[:rows][:, part]).abs().max() < 1e-4
print(*int4_layout())
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_layout_of_another_cpus_kernel_is_found(capability):
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert done.stdout.split() == {"default": ["64", "False"], "avx2": ["32", "True"]}[capability]
