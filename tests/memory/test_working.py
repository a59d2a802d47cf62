"""The predicted memory of evaluating masks follows its formula by hand, and bounds closely what real forwards take."""

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import combinations, pairwise

import pytest
import torch

from rap_env.llm.architecture import ARCHITECTURES
from rap_env.llm.embedded import EMBEDDED_NAME
from rap_env.llm.loading import build_tiny_llm, load_llm
from rap_env.llm.packing import TokenTree
from rap_env.llm.shape import ModelShape
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.measured import measured_peak, return_freed_memory
from rap_env.memory.working import working_bytes

SCRATCH = 16_777_216
HEAD_ROWS = 128


@pytest.fixture(scope="module")
def shape(tiny_llm) -> ModelShape:
    return tiny_llm.shape  # 4 bytes; hidden 32, queries 32, keys and values 16 each, MLP 64, vocabulary 257


def test_an_mlp_is_the_largest_part_of_a_tiny_model(shape):
    streams = 100 * 4 * 32 * (1 + 2)
    context = 100 * (2 * 4 * 16 + 32)
    mlp = 100 * 4 * (32 + 3 * 64)
    assert (streams, context, mlp) == (38_400, 16_000, 89_600)
    assert working_bytes(shape, 100, 2, head_rows=10) == streams + context + mlp + SCRATCH


PARTS = {
    "attention that rotates its queries": ({"intermediate_size": 8}, 100 * 4 * (32 + 4 * 32 + 2 * 16)),
    "attention that rotates its keys": ({"intermediate_size": 8, "kv_channels": 32}, 100 * 4 * (32 + 7 * 32)),
    "attention that norms its queries": (
        {"intermediate_size": 8, "kv_channels": 8, "bytes_per_parameter": 2},
        100 * (2 * 32 + (2 + 8) * 32),
    ),
    "a norm in front of narrow components": (
        {"intermediate_size": 8, "query_channels": 8, "kv_channels": 8, "bytes_per_parameter": 2, "vocab_size": 99},
        100 * 8 * 32,
    ),
    "a head in float32": ({"vocab_size": 5_000}, 100 * 4 * 32 + 10 * (4 * 32 + 5_000 * 8)),
    "a head in bfloat16": (
        {"vocab_size": 5_000, "bytes_per_parameter": 2},
        100 * 2 * 32 + 10 * (2 * 32 + 5_000 * (2 + 4 + 4)),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_only_the_largest_part_counts(shape, part):
    sizes, expected = PARTS[part]
    shape = dataclasses.replace(shape, **sizes)
    streams_and_context = 100 * shape.bytes_per_parameter * (32 + 2 * shape.kv_channels) + 100 * 32
    assert working_bytes(shape, 100, 0, head_rows=10) == streams_and_context + expected + SCRATCH


def test_a_head_reads_no_more_rows_than_there_are(shape):
    shape = dataclasses.replace(shape, vocab_size=50_000)
    assert working_bytes(shape, 7, 0, head_rows=128) == working_bytes(shape, 7, 0, head_rows=7)
    assert working_bytes(shape, 7, 0, head_rows=6) < working_bytes(shape, 7, 0, head_rows=7)


def test_heads_wider_than_any_kernel_takes_are_not_expected(shape):
    wide = dataclasses.replace(shape, query_channels=4096, kv_channels=4096, intermediate_size=16_384)
    mlp = 100 * 4 * (32 + 3 * 16_384)
    assert working_bytes(wide, 100, 0) == 100 * 4 * 32 + 100 * (2 * 4 * 256 + 32) + mlp + SCRATCH


@pytest.mark.parametrize("tokens", [1, 100, 4096])
def test_each_held_stream_adds_its_tensor(shape, tokens):
    with_streams = [working_bytes(shape, tokens, held) for held in range(5)]
    assert {more - less for less, more in pairwise(with_streams)} == {tokens * 4 * 32}


def test_no_argument_makes_it_smaller_when_it_grows(shape):
    shape = dataclasses.replace(shape, vocab_size=50_000)
    predicted: list[Callable[[int], int]] = [
        lambda n: working_bytes(shape, n, 3),
        lambda n: working_bytes(shape, 4096, n),
        lambda n: working_bytes(shape, 4096, 3, n),
        lambda n: working_bytes(dataclasses.replace(shape, vocab_size=n), 4096, 3),
        *(
            lambda n, name=name: working_bytes(dataclasses.replace(shape, **{name: n}), 4096, 3)
            for name in ("hidden_size", "intermediate_size", "query_channels", "kv_channels")
        ),
    ]
    for of in predicted:
        sizes = [of(n) for n in (1, 2, 3, 16, 100, 1000, 4096)]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured: masks over equal windows, forwarded by a model that a fresh process builds."""

    name: str
    dtype: str
    n_windows: int
    length: int
    packed: bool = False
    forks: int = 0

    @property
    def held_streams(self) -> int:
        return 1 + self.forks  # the one that was opened, and one at each fork

    def run(self, llm: SwitchableLLM) -> None:
        """Runs masks over one stream as evaluators do."""
        if self.packed:
            hidden, context, _ = llm.open_packed([TokenTree(tuple(range(self.length)))] * self.n_windows)
        else:
            hidden, context = llm.open_stream(torch.arange(self.length).repeat(self.n_windows, 1))
        components = llm.shape.components
        shallow = PruningMask.all_kept(llm.shape).drop(*components[4:])  # deeper ones take no more memory
        forks = components[1 : 1 + self.forks]
        masks = [shallow.drop(*dropped) for n in range(self.forks + 1) for dropped in combinations(forks, n)]
        for _mask, stream in llm.run_masks(masks, hidden, context):
            read(llm, stream.flatten(0, 1))

    def measure(self) -> tuple[int, int]:
        """Measured and predicted peak bytes of a second run, in the process that this is called in."""
        torch.set_num_threads(1)
        llm = build(self.name, self.dtype)
        with torch.inference_mode():
            self.run(llm)
            with measured_peak("cpu") as peak:
                self.run(llm)
        tokens = self.n_windows * self.length
        return peak.peak_bytes, working_bytes(llm.shape, tokens, self.held_streams, HEAD_ROWS)


@cache  # in the fresh process: what a freed model leaves behind would be used again by the next one
def build(name: str, dtype: str) -> SwitchableLLM:
    return build_tiny_llm(name, dtype=dtype) if name in ARCHITECTURES else load_llm(name, dtype, device="cpu")


def read(llm: SwitchableLLM, stream: torch.Tensor) -> None:
    states = stream[torch.arange(len(stream))]
    for start in range(0, 3 * HEAD_ROWS, HEAD_ROWS):
        logits = llm.logits(states[start : start + HEAD_ROWS]).float()
        logits.logsumexp(-1)


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """A process that keeps no freed memory, so that what is resident is what tensors take."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        if not process.submit(return_freed_memory).result():
            pytest.skip("this C library keeps freed memory")
        yield process


@pytest.mark.llm
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("n_windows", "length", "packed", "forks"),
    [(2, 512, False, 2), (1, 1024, True, 0), (8, 512, True, 1)],
)
def test_a_real_forward_takes_between_half_and_all_of_the_prediction(
    embedded_folder, fresh_process, dtype, n_windows, length, packed, forks
):
    case = Measured(EMBEDDED_NAME, dtype, n_windows, length, packed, forks)
    measured, predicted = fresh_process.submit(case.measure).result()
    print(f"{case}: measured {measured:,}, predicted {predicted:,}, {measured / predicted:.3f}")
    assert predicted / 2 < measured <= predicted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_no_family_takes_more_than_predicted(fresh_process, family, dtype):
    case = Measured(family, dtype, n_windows=512, length=64, packed=True, forks=1)
    measured, predicted = fresh_process.submit(case.measure).result()
    print(f"{case}: measured {measured:,}, predicted {predicted:,}, {measured / predicted:.3f}")
    assert predicted / 3 < measured <= predicted
