"""Part `peaks`: what the memory model predicts against what a live process takes, and how dropping shortens a step."""

import functools
import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import psutil

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import alternate, counted, speedup
from rap_env.components import MLP
from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.memory.footprint import activation_bytes
from rap_env.memory.measured import measured_peak
from rap_env.policies import DensePolicy
from rap_env.serving.coarse import CoarseWidths


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Serves workloads under random masks in a process that is warm, as an engine does, and times a few masks."""
    options = bench.options["peaks"]
    llm = bench.build_llm(granularity="group")
    WeightStore(llm)
    live, coarse = LiveModel(llm), CoarseWidths(DensePolicy(llm.shape), llm.shape)
    step = counted(progress, options["masks"] * len(options["workloads"]) + 1)
    longest_tokens = max(prompt + generated for _batch, prompt, generated in options["workloads"])
    baseline_bytes = _warm(live, options["read_tokens"], coarse.levels(), longest_tokens)
    generator = np.random.default_rng(options["seed"])
    peaks = []
    for _ in range(options["masks"]):
        mask = _random_mask(llm, coarse, generator)
        live.switch(mask)
        peaks += [
            step(_peak(live, mask, workload, options["read_tokens"], baseline_bytes))
            for workload in options["workloads"]
        ]
    return {"baseline_bytes": baseline_bytes, "peaks": peaks, "latency": step(_latency(live, options))}


def _warm(live: LiveModel, read_tokens: int, levels: list[PruningMask], longest_tokens: int) -> int:
    """Resident memory of the process that is not the model's, once everything has run that will run."""
    gc.collect()  # models of other parts
    live.warm_up(read_tokens, levels, longest_tokens)
    shape = live.llm.shape
    return psutil.Process().memory_info().rss - shape.fixed_bytes - live.llm.mask.weight_bytes


def _random_mask(llm: SwitchableLLM, coarse: CoarseWidths, generator: np.random.Generator) -> PruningMask:
    """Any coarse width in each site, also none."""
    options = zip(*(mask.widths for mask in coarse.levels()), strict=True)
    return PruningMask.from_widths(llm.shape, [int(generator.choice([0, *sorted({*own})])) for own in options])


def _peak(
    live: LiveModel, mask: PruningMask, workload: tuple[int, int, int], read_tokens: int, baseline_bytes: int
) -> dict[str, Any]:
    """Peak bytes above the baseline while prompts are read, in pieces, and tokens generated."""
    batch_size, prompt_tokens, generated_tokens = workload
    length, shape = prompt_tokens + generated_tokens, live.llm.shape
    before_bytes = psutil.Process().memory_info().rss
    with measured_peak(live.llm.device, trim=False) as peak:
        caches = [live.new_cache(length) for _ in range(batch_size)]
        for cache in caches:
            for start in range(0, prompt_tokens, read_tokens):
                live.read([(cache, range(1, 1 + min(read_tokens, prompt_tokens - start)))])
        for _ in range(generated_tokens):
            live.read([(cache, [1]) for cache in caches])
    kept_bytes = shape.fixed_bytes + mask.weight_bytes
    at_once = max(batch_size, min(read_tokens, prompt_tokens))
    return {
        "workload": list(workload),
        "weights_bytes": kept_bytes,
        "kv_cache_bytes": mask.kv_bytes_per_token * batch_size * length,
        "activation_bytes": activation_bytes(shape, mask, at_once, batch_size),
        "measured_bytes": before_bytes + peak.peak_bytes - baseline_bytes,
    }


def _latency(live: LiveModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of reading a prompt and of generated tokens: of the whole model, and of masks with a share of it."""
    masks = {"dense": PruningMask.all_kept(live.llm.shape), **_shares(live.llm, options["kept_ratio"])}
    seconds: dict[str, dict[str, list[float]]] = {}
    for batch_size in (0, *options["decoded_batches"]):
        ways = {name: functools.partial(_timed_steps, live, mask, batch_size, options) for name, mask in masks.items()}
        _taken, results = alternate(ways, options["repeats"])
        seconds["prefill" if not batch_size else f"decode {batch_size}"] = results
    return {
        "kept_ratios": {name: mask.weight_bytes / masks["dense"].weight_bytes for name, mask in masks.items()},
        "seconds": seconds,
    }


def _shares(llm: SwitchableLLM, kept_ratio: float) -> dict[str, PruningMask]:
    """Masks with about a share of the component weights: of whole layers, of all sites, and of MLPs alone."""
    sites, dense = llm.shape.components.sites, PruningMask.all_kept(llm.shape)
    widths = llm.shape.components.n_parts
    layers = round(kept_ratio * llm.shape.n_layers)
    mlp_bytes = sum(row.weight_bytes for row in llm.shape.components if row.site.kind == MLP)
    of_mlp = 1.0 - (1.0 - kept_ratio) * dense.weight_bytes / mlp_bytes
    ways = {
        "whole layers": [n if site.layer < layers else 0 for (site, _own), n in zip(sites, widths, strict=True)],
        "channels": [
            max(1, round(of_mlp * n)) if site.kind == MLP else n for (site, _own), n in zip(sites, widths, strict=True)
        ],
    }
    return {name: PruningMask.from_widths(llm.shape, own) for name, own in ways.items()}


def _timed_steps(
    live: LiveModel, mask: PruningMask, batch_size: int, options: Mapping[str, Any], _repeat: int
) -> float:
    """Mean seconds of a step; one beforehand is not counted."""
    live.switch(mask)
    prompt = range(1, 1 + options["prompt_tokens"])
    if not batch_size:
        live.read([(live.new_cache(len(prompt)), prompt)])
        started = time.perf_counter()
        live.read([(live.new_cache(len(prompt)), prompt)])
        return time.perf_counter() - started
    caches = [live.new_cache(len(prompt) + options["decoded_tokens"] + 1) for _ in range(batch_size)]
    for cache in caches:
        live.read([(cache, prompt)])
    live.read([(cache, [1]) for cache in caches])
    started = time.perf_counter()
    for _ in range(options["decoded_tokens"]):
        live.read([(cache, [1]) for cache in caches])
    return (time.perf_counter() - started) / options["decoded_tokens"]


def lines(results: Mapping[str, Any]) -> list[str]:
    """What is printed."""
    errors = [_predicted(each) / each["measured_bytes"] - 1 for each in results["peaks"]]
    workloads = len({tuple(each["workload"]) for each in results["peaks"]})
    masks = len(results["peaks"]) // workloads
    measured = [each["measured_bytes"] / 1e6 for each in results["peaks"]]
    printed = [
        f"{masks} masks x {workloads} workloads: predicted over measured peak {min(errors):+.1%} to {max(errors):+.1%},"
        f" median {median(errors):+.1%}; measured are {min(measured):.0f} to {max(measured):.0f} MB above the baseline"
    ]
    latency = results["latency"]
    for what, seconds in sorted(latency["seconds"].items()):
        for name, own in sorted(seconds.items()):
            if name != "dense":
                found = speedup(own, seconds["dense"])  # as a share of the dense model's
                ratios = found["ratios"]
                printed.append(
                    f"{what}, {name} with {latency['kept_ratios'][name]:.0%} of the weights of all sites:"
                    f" {found['ratio']:.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of dense, {found['repeats']} repeats"
                )
    return printed


def _predicted(peak: Mapping[str, Any]) -> int:
    return peak["weights_bytes"] + peak["kv_cache_bytes"] + peak["activation_bytes"]
