"""Part `rounding`: how far log-likelihoods in the model's type lie from those in float32, upstream's and ours."""

from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks.bench import Bench
from rap_env.llm.switchable import SwitchableLLM


@torch.inference_mode()
def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Every token but the first of the calibration windows, read by the dense model."""
    windows, exact_llm = bench.windows(), bench.build_llm(dtype="float32")
    exact = _log_likelihoods(exact_llm.model(windows, use_cache=False).logits, windows)
    found = {
        "upstream": _log_likelihoods(bench.llm.model(windows, use_cache=False).logits, windows),
        "ours": _log_likelihoods(_ours(bench.llm, windows), windows),
        "ours in float32": _log_likelihoods(_ours(exact_llm, windows), windows),
    }
    progress(1, 1)
    return {"tokens": exact.numel(), "dtype": str(bench.llm.dtype)} | {
        name: {
            "mean_absolute": (own - exact).abs().mean().item(),
            "largest": (own - exact).abs().max().item(),
            "of_the_loss": (exact - own).mean().item(),
        }
        for name, own in found.items()
    }


def _ours(llm: SwitchableLLM, windows: torch.Tensor) -> torch.Tensor:
    return llm.logits(llm.run(llm.shape.sites, *llm.open_stream(windows)))


def _log_likelihoods(logits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].float().log_softmax(-1).gather(2, windows[:, 1:, None])


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    return [
        f"{name}: log-likelihoods of {results['tokens']:,} tokens differ from float32 by {entry['mean_absolute']:.4f}"
        f" on average, {entry['largest']:.2f} at most; the loss by {entry['of_the_loss']:+.5f}"
        for name in ("upstream", "ours", "ours in float32")
        if (entry := results[name])
    ]
