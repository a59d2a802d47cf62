"""What measurements share: timings taken alternately in one run, as ratios, beside the machine's own GEMM rate."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

# By published model of Llama's architecture: hidden size, intermediate size, layers, heads, KV heads, vocabulary.
_LLAMAS = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
}
_GEMM_SIZES = {"cpu": 2048, "cuda": 8192}  # rows and columns; larger ones are no faster on the devices tried


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def best_seconds(function: Callable[[], Any]) -> float:
    """The shortest of five calls: what the machine can do."""
    return min(timed(function)[0] for _ in range(5))


def counted(progress: Callable[[int, int], None], n_steps: int) -> Callable[..., Any]:
    """A function that reports one more step and returns what it is given, so that calls can stand within it."""
    done = iter(range(1, n_steps + 1))

    def step(result: Any = None) -> Any:
        progress(next(done), n_steps)
        return result

    return step


def alternate(ways: Mapping[str, Callable[[int], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, list]]:
    """Calls every way once in each repeat, in turned order every second time, so that drift hits all alike.

    Args:
        ways: Functions of the repeat's number, by name.
        repeats: How often each is called.

    Returns:
        Seconds and results of each way, one for each repeat.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, list] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in list(ways) if repeat % 2 == 0 else reversed(list(ways)):
            taken, result = timed(lambda name=name, repeat=repeat: ways[name](repeat))
            seconds[name].append(taken)
            results[name].append(result)
    return seconds, results


def speedup(plain_seconds: Sequence[float], our_seconds: Sequence[float]) -> dict[str, Any]:
    """Medians of both and of the ratios, repeat by repeat; the ratios' range tells the noise."""
    ratios = [plain / ours for plain, ours in zip(plain_seconds, our_seconds, strict=True)]
    return {
        "plain_seconds": list(plain_seconds),
        "our_seconds": list(our_seconds),
        "plain_median_seconds": median(plain_seconds),
        "our_median_seconds": median(our_seconds),
        "ratios": ratios,
        "ratio": median(ratios),
        "repeats": len(ratios),
    }


def in_type(results: Mapping[str, Any]) -> str:
    """How upstream's type is told, where a part's record has another one than bfloat16."""
    dtype = results.get("plain_dtype", "torch.bfloat16").removeprefix("torch.")
    return "" if dtype == "bfloat16" else f" in {dtype}"


@torch.inference_mode()
def plain_loss(llm: SwitchableLLM, windows: torch.Tensor, mask: PruningMask) -> float:
    """Loss on windows as published searches take it: upstream's whole forward, all logits, one float32 copy.

    Args:
        llm: The model.
        windows: Tokens [N, T].
        mask: Over components with the same names.
    """
    windows = windows.to(llm.device)
    with llm.pruned(PruningMask.from_bits(llm.shape, mask.keep)):  # which may be in another type than the mask's model
        logits = llm.model(windows, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def gemm_flops_per_second(llm: SwitchableLLM) -> float:
    """The best rate of a large matrix product on the model's device, in floating point operations.

    In the model's type, or in float32 where that is quicker: on processors without instructions for bfloat16.
    """
    return max(_gemm_flops_per_second(llm.device, dtype) for dtype in {llm.dtype, torch.float32})


def _gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    size = _GEMM_SIZES[device.type]
    left = torch.randn(size, size).to(device, dtype)
    torch.nn.functional.linear(left, left)
    return 2 * size**3 / best_seconds(lambda: torch.nn.functional.linear(left, left))


def forward_flops(llm: SwitchableLLM, mask: PruningMask, tokens: int, head_rows: int) -> int:
    """Floating point operations of the matrix products with weights; attention scores are left out.

    Args:
        llm: The model.
        mask: What is kept.
        tokens: Tokens that run through the kept components.
        head_rows: Positions whose logits are computed.
    """
    kept_parameters = sum(component.weight_bytes for component in mask.kept) // llm.shape.bytes_per_parameter
    return 2 * tokens * kept_parameters + 2 * head_rows * llm.shape.hidden_size * llm.shape.vocab_size


def random_llama(name: str, dtype: str, device: str) -> SwitchableLLM:
    """A model of a published one's shape with random weights, made on the device."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = _LLAMAS[name]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": name.startswith("smollm2"),
    }
    return build_random_llm("llama", sizes, dtype=dtype, device=device)
