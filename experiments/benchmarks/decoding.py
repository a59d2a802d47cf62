"""Part `decoding`: next tokens of one dense sequence, by a live model against `generate` of transformers."""

from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import alternate, counted, speedup
from rap_env.llm.live import LiveModel


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Greedy tokens behind a prompt, batch size 1; the time that reading the prompt takes is taken off both."""
    options, llm = bench.options["decoding"], bench.llm
    prompt = bench.windows()[0, : options["prompt_tokens"]].tolist()
    live, step = LiveModel(llm), counted(progress, 4 * options["repeats"])

    @torch.inference_mode()
    def generated(n_new: int) -> list[int]:
        settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
        return llm.model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()

    def read(n_new: int) -> list[int]:
        cache, found, tokens = live.new_cache(len(prompt) + n_new), [], prompt
        for _ in range(n_new):
            tokens = [int(live.read([(cache, tokens)])[0].argmax())]
            found += tokens
        return found

    new = options["new_tokens"]
    generated(2), read(2)
    ways = {
        "generate": lambda _: step(generated(new)),
        "live": lambda _: step(read(new)),
        "generate, prompt": lambda _: step(generated(1)),
        "live, prompt": lambda _: step(read(1)),
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
