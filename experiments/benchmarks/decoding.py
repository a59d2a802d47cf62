"""Part `decoding`: next tokens of one dense sequence, by a live model against `generate` of transformers."""

from collections.abc import Callable
from typing import Any

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.generation import generated, read_together
from experiments.benchmarks.timing import alternate, counted, speedup
from rap_env.llm.live import LiveModel


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Greedy tokens behind a prompt, batch size 1; the time that reading the prompt takes is taken off both."""
    options, llm = bench.options["decoding"], bench.llm
    prompt = bench.windows()[0, : options["prompt_tokens"]].tolist()
    live, step = LiveModel(llm), counted(progress, 4 * options["repeats"])

    new = options["new_tokens"]
    generated(llm, [prompt], 2), read_together(live, [prompt], 2)
    ways = {
        "generate": lambda _: step(generated(llm, [prompt], new)[0]),
        "live": lambda _: step(read_together(live, [prompt], new)[0]),
        "generate, prompt": lambda _: step(generated(llm, [prompt], 1)[0]),
        "live, prompt": lambda _: step(read_together(live, [prompt], 1)[0]),
    }
    seconds, tokens = alternate(ways, options["repeats"])
    plain, ours = (
        [whole - first for whole, first in zip(seconds[name], seconds[f"{name}, prompt"], strict=True)]
        for name in ("generate", "live")
    )
    return {
        "decoding": speedup(plain, ours),
        "prompt": speedup(seconds["generate, prompt"], seconds["live, prompt"]),
        "equal_tokens": sum(a == b for a, b in zip(tokens["generate"][0], tokens["live"][0], strict=True)),
        "new_tokens": new,
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    return [
        f"decoding one sequence: {results['decoding']['ratio']:.2f} times as fast as generate"
        f" [{min(results['decoding']['ratios']):.2f}, {max(results['decoding']['ratios']):.2f}],"
        f" reading its prompt {results['prompt']['ratio']:.2f} times;"
        f" {results['equal_tokens']} of {results['new_tokens']} tokens equal"
    ]
