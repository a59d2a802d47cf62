"""Part `profile`: where the time of an evaluation and of decoding goes, and how far each share is from its limit."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.generation import read_together
from experiments.benchmarks.timing import counted, gemm_flops_per_second
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

_FUSED = "mkldnn::_linear_pointwise"
_PRODUCTS = ("aten::mm", "aten::addmm", _FUSED)
_ATTENTION = ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax")
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
        "decoding": lambda: read_together(LiveModel(llm), [windows[0, :64].tolist()], options["decoded_tokens"]),
    }
    step, shares = counted(progress, len(works)), {}
    for name, work in works.items():
        work()
        started = time.perf_counter()
        work()
        plain_seconds = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            work()
        shares[name] = step(_shares(llm, recorded.events(), plain_seconds))
    return {"shares": shares, "limits": _limits(llm), "threads": torch.get_num_threads()}


def _shares(llm: SwitchableLLM, events: Iterable[Any], plain_seconds: float) -> dict[str, Any]:
    """Seconds of an operation's own by kind, operations of products, and the call's seconds without a profiler."""
    seconds: dict[str, float] = defaultdict(float)
    operations: dict[str, float] = defaultdict(float)
    sizes = {one.shape[0] for site in llm.shape.sites for one in llm.parameters_of(site)}
    for event in events:
        kind = _kind(event.name, event.input_shapes, sizes)
        seconds[kind] += event.self_cpu_time_total / 1e6
        operations[kind] += _operations(event.name, event.input_shapes)
    return {"seconds": plain_seconds, "profiled_seconds": dict(seconds), "operations": dict(operations)}


def _kind(name: str, shapes: Sequence[Sequence[int]], sizes: Set[int]) -> str:
    """Of an operation; `sizes` are the numbers of outputs of the sites' matrices."""
    if name in _PRODUCTS:
        return "matrix products" if _outputs(name, shapes) in sizes else "head"
    for kind, names in {"attention": _ATTENTION, "log-softmax": _LOSSES, "copies": _COPIES}.items():
        if name in names:
            return kind
    return "element-wise and the rest"


def _outputs(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Of a product: the last matrix is the one with the weights, by rows for oneDNN's operation."""
    weight = [shape for shape in shapes if len(shape) >= 2][-1]
    return weight[0] if name == _FUSED else weight[-1]


def _operations(name: str, shapes: Sequence[Sequence[int]]) -> float:
    """Floating point operations of a product."""
    if name not in (*_PRODUCTS, "aten::bmm"):
        return 0.0
    inputs = next(shape for shape in shapes if len(shape) >= 2)
    return 2.0 * math.prod(inputs) * _outputs(name, shapes)


def _limits(llm: SwitchableLLM) -> dict[str, float]:
    """The machine's own rates: of a large product, and of a copy that no cache holds."""
    source = torch.empty(2**27, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return {
        "gemm_flops_per_second": gemm_flops_per_second(llm),
        "copy_bytes_per_second": 2 * source.numel() / best,
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    gemm = results["limits"]["gemm_flops_per_second"]
    printed = [
        f"large products run at {gemm / 1e9:,.0f} GFLOP/s, copies at"
        f" {results['limits']['copy_bytes_per_second'] / 1e9:.1f} GB/s, threads: {results['threads']}"
    ]
    for name, entry in sorted(results["shares"].items()):
        printed.append(f"{name}: {_told(entry, gemm)}")
    return printed


def _told(entry: Mapping[str, Any], gemm: float) -> str:
    total, parts = sum(entry["profiled_seconds"].values()), []
    for kind, seconds in sorted(entry["profiled_seconds"].items(), key=lambda item: -item[1]):
        rate = entry["operations"].get(kind, 0.0) / seconds / gemm if seconds else 0.0
        parts.append(f"{kind} {seconds / total:.0%}" + (f" (at {rate:.0%} of the GEMM rate)" if rate else ""))
    return ", ".join(parts)
