"""Part `scaling`: how the cost of evaluating grows with tokens, layers, masks and parameters."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.population import offspring
from experiments.benchmarks.timing import counted, gemm_flops_per_second, random_llama, timed
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

_WINDOW_TOKENS = 256


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Times whole evaluations (body, head and loss) on random tokens; what they say does not matter here."""
    llm, options = bench.llm, bench.options["scaling"]
    dense = PruningMask.all_kept(llm.shape)
    shuffled = np.random.default_rng(0).permutation([component.name for component in dense.components])
    parent = dense.drop(*shuffled[: len(shuffled) // 4])
    windows = _windows(llm, 4 * _WINDOW_TOKENS)
    curves = {
        "tokens": ("tokens", lambda size: (llm, _windows(llm, size), [dense])),
        "layers": ("kept layers", lambda size: (llm, windows, [_first_layers(dense, size)])),
        "masks": (
            "masks, one swap from a parent",
            lambda size: (llm, windows, offspring(parent, size, 1, np.random.default_rng(size))),
        ),
        "models": ("parameters", lambda name: _random_case(name, llm)),
    }
    step, results = counted(progress, sum(len(options[name]) for name in curves)), {}
    for name, (unit, case_of) in curves.items():
        sizes, seconds = [], []
        for size in options[name]:
            model, tokens, masks = case_of(size)
            parameters = model.shape.weight_bytes // model.shape.bytes_per_parameter
            sizes.append(parameters if name == "models" else size)
            seconds.append(_median_seconds(model, tokens, masks, options["repeats"]))
            del model  # before the next one is built
            step()
        results[name] = {"unit": unit, "sizes": sizes, "seconds": seconds, "exponent": exponent(sizes, seconds)}
    return results | {"gemm_flops_per_second": gemm_flops_per_second(llm), "repeats": options["repeats"]}


def _median_seconds(llm: SwitchableLLM, windows: torch.Tensor, masks: Sequence[PruningMask], repeats: int) -> float:
    evaluator = PerplexityEvaluator(windows, "random")
    list(evaluator.evaluate_many(llm, masks))  # the first call allocates
    return median(timed(lambda: list(evaluator.evaluate_many(llm, masks)))[0] for _ in range(repeats))


def _first_layers(dense: PruningMask, n_layers: int) -> PruningMask:
    return dense.drop(*(component for component in dense.components if component.site.layer >= n_layers))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The p of the best fit seconds = c * size ** p, by least squares on logarithms; None for fewer than two sizes."""
    return None if len(sizes) < 2 else float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _windows(llm: SwitchableLLM, tokens: int) -> torch.Tensor:
    """Random tokens [N, 256], or [1, tokens] for fewer."""
    generator = torch.Generator().manual_seed(0)
    length = min(_WINDOW_TOKENS, tokens)
    return torch.randint(0, llm.shape.vocab_size, (tokens // length, length), generator=generator)


def _random_case(name: str, llm: SwitchableLLM) -> tuple[SwitchableLLM, torch.Tensor, list[PruningMask]]:
    model = random_llama(name, str(llm.dtype).removeprefix("torch."), str(llm.device))
    return model, _windows(model, 2 * _WINDOW_TOKENS), [model.mask]


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    return [
        f"{name}: seconds grow with the power {curve['exponent']:.2f} of {curve['unit']}, from {curve['sizes'][0]:,}"
        f" ({curve['seconds'][0]:.2f} s) to {curve['sizes'][-1]:,} ({curve['seconds'][-1]:.2f} s)"
        for name, curve in sorted(results.items())
        if isinstance(curve, dict) and curve["exponent"] is not None
    ]
