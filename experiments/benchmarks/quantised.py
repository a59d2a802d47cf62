"""Part `quantised`: bytes, perplexity and speed of number formats, whole and with a part of all MLP channels."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import alternate, counted, speedup
from rap_env.calibration import packaged_corpus
from rap_env.calibration.corpus import local_text
from rap_env.calibration.sampling import consecutive_windows
from rap_env.components import ATTENTION, MLP
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.quantised import KERNEL_ROWS
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload

_PROMPT_TOKENS = 64  # in front of what is decoded
_FULL = "full weights, full KV cache"


def name_of(weights: str, kv_cache: str) -> str:
    return f"{weights} weights, {kv_cache} KV cache"


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measures each format on the first windows of a text; all are timed in turn, and compared repeat by repeat."""
    options = bench.options["quantised"]
    formats = {name_of(*pair): pair for pair in [("full", "full"), *map(tuple, options["formats"])]}
    llms = {name: _built(bench, *pair) for name, pair in formats.items()}
    text = "".join(packaged_corpus("evaluation").documents) if options["text"] is None else local_text(options["text"])
    windows = consecutive_windows(text, bench.llm.tokenizer, options["window_tokens"], options["windows"])
    step = counted(progress, len(llms) * (1 + 4 * options["repeats"]))
    results = {name: step(_quality(llm, windows)) for name, llm in llms.items()}
    for name, pair in formats.items():
        narrow = f"{name}, {options['mlp_channels']:.0%} of all MLP channels"
        llms[narrow] = _built(bench, *pair, options["mlp_channels"])
        results[narrow] = _size_of(llms[narrow])  # nothing chose the channels, so their loss says nothing
    ways = {"decoding": _decoding(llms, windows[0], options["decoded_tokens"]), "prefill": _prefill(llms, windows[0])}
    for task, of_models in ways.items():
        timings, _ = alternate(_stepping(of_models, step), options["repeats"])
        for name, seconds in timings.items():
            results[name][task] = speedup(timings[_FULL], seconds)
    found = [{"format": name, **result} for name, result in results.items()]  # a list: records sort their keys
    return {"formats": found, "windows": list(windows.shape), "decoded_tokens": options["decoded_tokens"]}


def _built(bench: Bench, weights: str, kv_cache: str, mlp_channels: float = 1.0) -> SwitchableLLM:
    """A model in a number format that keeps a part of the channels of every MLP."""
    llm = bench.build_llm(granularity="group", weights=weights, kv_cache=kv_cache)
    kept = {ATTENTION: 1.0, MLP: mlp_channels}
    widths = [round(kept[site.kind] * (own.stop - own.start)) for site, own in llm.shape.components.sites]
    llm.apply(PruningMask.from_widths(llm.shape, widths))
    return llm


def _stepping(ways: Mapping[str, Callable[[], Any]], step: Callable[..., Any]) -> dict[str, Callable[[int], Any]]:
    for way in ways.values():
        way()  # once to warm up
    return {name: lambda _repeat, way=way: step(way()) for name, way in ways.items()}


@torch.inference_mode()
def _quality(llm: SwitchableLLM, windows: torch.Tensor) -> dict[str, Any]:
    few = KERNEL_ROWS * 2 // 3
    apart = [_logits(llm, window[:few]) - _logits(llm, window)[:few] for window in windows]
    spread = torch.stack([_logits(llm, window)[1:few] for window in windows]).std()
    metrics = PerplexityEvaluator(windows, "text").evaluate(llm).tasks["text"]
    return {
        **_size_of(llm),
        "loss": metrics["loss"],
        # Of logits behind the first token, whose activations are huge.
        "few_rows_from_many": (torch.stack(apart)[:, 1:].square().mean().sqrt() / spread).item(),
    }


def _size_of(llm: SwitchableLLM) -> dict[str, int]:
    one_token = footprint(llm.shape, llm.mask, Workload(1, 1))
    return {"weight_bytes": one_token.weights_bytes, "kv_bytes_per_token": one_token.kv_cache_bytes}


def _logits(llm: SwitchableLLM, tokens: torch.Tensor) -> torch.Tensor:
    return llm.model(tokens[None].to(llm.device), use_cache=False).logits[0].float()


def _decoding(llms: Mapping[str, SwitchableLLM], window: torch.Tensor, n_tokens: int) -> dict[str, Callable[[], Any]]:
    """Feeds tokens one by one, behind a prompt that is read once."""

    @torch.inference_mode()
    def decode(llm: SwitchableLLM, tokens: torch.Tensor, prompt: Any) -> None:
        cache = copy.deepcopy(prompt)
        for position in range(n_tokens):
            llm.model(tokens[:, position % tokens.shape[1], None], past_key_values=cache)

    ways = {}
    for name, llm in llms.items():
        tokens = window[None].to(llm.device)
        with torch.inference_mode():
            prompt = llm.model(tokens[:, :_PROMPT_TOKENS], logits_to_keep=1).past_key_values
        ways[name] = lambda llm=llm, tokens=tokens, prompt=prompt: decode(llm, tokens, prompt)
    return ways


def _prefill(llms: Mapping[str, SwitchableLLM], window: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Reads a window as a prompt, with logits for its last token."""

    @torch.inference_mode()
    def read(llm: SwitchableLLM) -> None:
        llm.model(window[None].to(llm.device), logits_to_keep=1)

    return {name: lambda llm=llm: read(llm) for name, llm in llms.items()}


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed; times are ratios to those of the model as it was loaded."""
    full, *others = results["formats"]
    printed = [f"{_size(full)}; loss {full['loss']:.4f}; few rows and many differ by {full['few_rows_from_many']:.1%}"]
    for found in others:
        times = [f"{task} in {_range([1 / r for r in found[task]['ratios']])}" for task in ("decoding", "prefill")]
        quality = (
            f"; loss {found['loss'] - full['loss']:+.4f}; few rows and many differ by {found['few_rows_from_many']:.1%}"
            if "loss" in found
            else ""
        )
        printed.append(f"{_size(found)}; {', '.join(times)} of the time{quality}")
    return printed


def _size(found: Mapping[str, Any]) -> str:
    megabytes = found["weight_bytes"] / 1e6
    return f"{found['format']}: {megabytes:.1f} MB, {found['kv_bytes_per_token']:,} B of cache a token"


def _range(ratios: Sequence[float]) -> str:
    ordered = sorted(ratios)
    return f"{ordered[len(ordered) // 2]:.2f} [{ordered[0]:.2f}, {ordered[-1]:.2f}]"
