"""Part `decoding`: next tokens of dense sequences, by a live model against `generate` of transformers."""

from collections.abc import Callable
from itertools import chain
from typing import Any

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.generation import generated, read_together
from experiments.benchmarks.timing import alternate, counted, in_type, speedup
from rap_env.errors import InvalidWorkload
from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Greedy tokens behind prompts, for each number of sequences; the time that reading prompts takes is taken off."""
    options, windows = bench.options["decoding"], bench.windows()
    if max(options["sequences"]) > len(windows):
        raise InvalidWorkload(
            f"expected at most {len(windows)} sequences, for so many windows `calibration.n_samples` gives prompts;"
            f" got {max(options['sequences'])}"
        )
    live, upstream = LiveModel(bench.llm), bench.upstream(bench.llm)
    step = counted(progress, 4 * options["repeats"] * len(options["sequences"]))
    prompts = windows[:, : options["prompt_tokens"]].tolist()
    return {
        "new_tokens": options["new_tokens"],
        "plain_dtype": str(upstream.dtype),
        "by_sequences": {str(n): _of(live, upstream, prompts[:n], options, step) for n in options["sequences"]},
    }


def _of(
    live: LiveModel, upstream: SwitchableLLM, prompts: list[list[int]], options: dict[str, Any], step: Callable
) -> dict[str, Any]:
    new = options["new_tokens"]
    generated(upstream, prompts, 2), read_together(live, prompts, 2)
    ways = {
        "generate": lambda _: step(generated(upstream, prompts, new)),
        "live": lambda _: step(read_together(live, prompts, new)),
        "generate, prompt": lambda _: step(generated(upstream, prompts, 1)),
        "live, prompt": lambda _: step(read_together(live, prompts, 1)),
    }
    seconds, tokens = alternate(ways, options["repeats"])
    plain, ours = (
        [whole - first for whole, first in zip(seconds[name], seconds[f"{name}, prompt"], strict=True)]
        for name in ("generate", "live")
    )
    flat = [chain.from_iterable(tokens[name][0]) for name in ("generate", "live")]
    return {
        "decoding": speedup(plain, ours),
        "prompt": speedup(seconds["generate, prompt"], seconds["live, prompt"]),
        "equal_tokens": sum(a == b for a, b in zip(*flat, strict=True)),
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    return [
        f"decoding {n} sequences: {of['decoding']['ratio']:.2f} times as fast as generate{in_type(results)}"
        f" [{min(of['decoding']['ratios']):.2f}, {max(of['decoding']['ratios']):.2f}],"
        f" reading their prompts {of['prompt']['ratio']:.2f} times;"
        f" {of['equal_tokens']} of {int(n) * results['new_tokens']} tokens equal"
        for n, of in sorted(results["by_sequences"].items(), key=lambda item: int(item[0]))  # records sort by letters
    ]
