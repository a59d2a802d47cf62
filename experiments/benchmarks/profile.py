"""Part `profile`: where the time of an evaluation and of decoding goes, and how far each share is from its limit."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import best_seconds, counted, gemm_flops_per_second, timed
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm import few_rows
from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

_FUSED = "mkldnn::_linear_pointwise"
_PRODUCTS = ("aten::mm", "aten::addmm", _FUSED)
_OF_FEW_ROWS, _OF_ONE_TOKEN = "few_rows::product", "few_rows::attend"
_ATTENTION = ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax")
_ATTENTION += (_OF_ONE_TOKEN,)
_LOSSES = ("aten::_log_softmax", "aten::logsumexp", "aten::gather")
_COPIES = ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::zero_", "aten::embedding")


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Profiles each kind of work once, after a call that warms it up."""
    options, llm = bench.options["profile"], bench.llm
    windows = bench.windows()
    text, dense = PerplexityEvaluator(windows, "calibration"), PruningMask.all_kept(llm.shape)
    population = [dense.drop(component) for component in dense.components[:: options["every"]]]
    works: dict[str, Callable[[], Any]] = {
        "text": lambda: list(text.evaluate_many(llm, [dense])),
        "tasks": lambda: list(bench.evaluator.evaluate_many(llm, [dense])),
        "population": lambda: list(text.evaluate_many(llm, population)),
        "decoding": _decoding(llm, windows[0, :64].tolist(), options["decoded_tokens"]),
    }
    step, shares = counted(progress, len(works)), {}
    for name, work in works.items():
        work()
        plain_seconds, _ = timed(work)
        with _kernels_seen(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            work()
        shares[name] = step(_shares(llm, recorded.events(), plain_seconds))
    return {"shares": shares, "limits": _limits(llm), "threads": torch.get_num_threads()}


def _decoding(llm: SwitchableLLM, prompt: Sequence[int], n_tokens: int) -> Callable[[], None]:
    """Reads tokens one by one behind a prompt, the same whenever it is called."""
    live = LiveModel(llm)
    cache = live.new_cache(len(prompt) + n_tokens)
    live.read([(cache, prompt)])

    def decode() -> None:
        cache.length = len(prompt)
        for _ in range(n_tokens):
            live.read([(cache, prompt[-1:])])

    return decode


@contextlib.contextmanager
def _kernels_seen() -> Iterator[None]:
    """Lets the profiler, which sees torch's operations only, see the kernels of few rows as well."""
    kernels = few_rows._few_rows
    if kernels is None:
        yield
        return

    def seen(name: str) -> Callable[..., None]:
        def run(*given: Any) -> None:
            sizes = given[-4:-1] if name == "product" else ()
            with record_function(" ".join(map(str, (f"few_rows::{name}", *sizes)))):
                getattr(kernels, name)(*given)

        return run

    few_rows._few_rows = SimpleNamespace(**{name: seen(name) for name in ("product", "attend", "norm", "rotate")})
    try:
        yield
    finally:
        few_rows._few_rows = kernels


def _shares(llm: SwitchableLLM, events: Iterable[Any], plain_seconds: float) -> dict[str, Any]:
    """By kind: seconds of an operation's own, and of products the operations and bytes of weights.

    Besides, the call's seconds without a profiler.
    """
    seconds, operations, weight_bytes = (defaultdict(float) for _ in range(3))
    sizes = {one.shape[0] for site in llm.shape.sites for one in llm.parameters_of(site)}
    for event in events:
        product = _product(event.name, event.input_shapes)
        kind = _kind(event.name, product, sizes)
        seconds[kind] += event.self_cpu_time_total / 1e6
        if product is not None:
            operations[kind] += 2.0 * math.prod(product)
            weight_bytes[kind] += 0 if kind == "attention" else math.prod(product[1:]) * llm.dtype.itemsize
    return {
        "seconds": plain_seconds,
        "profiled_seconds": dict(seconds),
        "operations": dict(operations),
        "weight_bytes": dict(weight_bytes),
    }


def _kind(name: str, product: tuple[int, int, int] | None, sizes: Set[int]) -> str:
    """Of an operation; `sizes` are the numbers of outputs of the sites' matrices."""
    if product is not None and name not in _ATTENTION:
        return "matrix products" if product[1] in sizes else "head"
    for kind, names in {"attention": _ATTENTION, "log-softmax": _LOSSES, "copies": _COPIES}.items():
        if name in names:
            return kind
    return "element-wise and the rest"


def _product(name: str, shapes: Sequence[Sequence[int]]) -> tuple[int, int, int] | None:
    """Rows, outputs and inputs of a matrix product; None of another operation."""
    if name.startswith(_OF_FEW_ROWS):
        rows, n_outputs, n_inputs = map(int, name.split()[1:])
        return rows, n_outputs, n_inputs
    if name not in (*_PRODUCTS, "aten::bmm"):
        return None
    matrices = [shape for shape in shapes if len(shape) >= 2]
    inputs, weight = matrices[0], matrices[-1]  # the last one has the weights, by rows for oneDNN's operation
    return math.prod(inputs[:-1]), weight[0] if name == _FUSED else weight[-1], inputs[-1]


def _limits(llm: SwitchableLLM) -> dict[str, float]:
    """The machine's own rates: of a large product, and of a copy and of reading what no cache holds."""
    source = torch.zeros(2**25)
    target = torch.empty_like(source)
    return {
        "gemm_flops_per_second": gemm_flops_per_second(llm),
        "copy_bytes_per_second": 2 * source.nbytes / best_seconds(lambda: target.copy_(source)),
        "read_bytes_per_second": 2 * source.nbytes / best_seconds(lambda: torch.dot(source, target)),
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    limits = results["limits"]
    printed = [
        f"large products run at {limits['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s, copies at"
        f" {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, reading at"
        f" {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, threads: {results['threads']}"
    ]
    for name, entry in sorted(results["shares"].items()):
        printed.append(f"{name}: {_told(entry, limits)}")
    return printed


def _told(entry: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """The share of each kind of operation, and how near products are to the limit that they are nearer to."""
    total, parts = sum(entry["profiled_seconds"].values()), []
    for kind, seconds in sorted(entry["profiled_seconds"].items(), key=lambda item: -item[1]):
        near = ""
        if seconds and (operations := entry["operations"].get(kind)):
            of_gemm = operations / seconds / limits["gemm_flops_per_second"]
            of_reading = entry["weight_bytes"][kind] / seconds / limits["read_bytes_per_second"]
            near = f" (at {of_gemm:.0%} of the GEMM rate)"
            if of_reading > of_gemm:
                near = f" (at {of_reading:.0%} of the rate of reading)"
        parts.append(f"{kind} {seconds / total:.0%}{near}")
    return ", ".join(parts)
