"""Part `live`: memory that leaves the process, how long a switch takes, and what a past costs that is missing."""

import time
from collections.abc import Callable, Mapping
from statistics import mean, median
from typing import Any

import psutil
import torch

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import counted, timed
from rap_env.calibration import packaged_corpus
from rap_env.calibration.corpus import local_text
from rap_env.calibration.sampling import consecutive_windows
from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from rap_env.widths.prepare import prepare_widths

_WAYS = ("stays pruned", "left out", "from now", "exact")  # the mask stays; it grows, and heads that come back ...


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Switches between the whole model and parts of all sites, and goes on with sequences that were read with parts."""
    options = bench.options["live"]
    llm = bench.build_llm(granularity="group")
    prepare_widths(llm, bench.windows())
    dense = PruningMask.all_kept(llm.shape)
    masks = {f"{share:.0%}": _part_of_all(llm, share) for share in options["shares"]}
    text = "".join(packaged_corpus("evaluation").documents) if options["text"] is None else local_text(options["text"])
    n_tokens = options["read_tokens"] + options["scored_tokens"]
    windows = consecutive_windows(text, llm.tokenizer, n_tokens, options["windows"])
    step = counted(progress, len(masks) * (options["repeats"] + len(windows)))
    before = {name: _logits(llm, mask, windows[0]) for name, mask in {"dense": dense, **masks}.items()}
    store, switches, pasts = WeightStore(llm), {}, {}
    live = LiveModel(llm)
    for name, mask in masks.items():
        found = [step(_switched(store, llm, mask)) for _ in range(options["repeats"])]
        equal = torch.equal(_logits(llm, dense, windows[0]), before["dense"])
        store.switch(mask)
        equal &= torch.equal(_logits(llm, mask, windows[0]), before[name])
        store.switch(dense)
        switches[name] = {
            "dropped_bytes": sum(component.weight_bytes for component in mask.dropped),
            "weights_bytes": footprint(llm.shape, dense, Workload(1, 1)).weights_bytes,
            "equal_logits": equal,
            **{key: [one[key] for one in found] for key in found[0]},
        }
        of_windows = [step(_past(live, mask, window, options["read_tokens"])) for window in windows]
        pasts[name] = {way: {key: [one[way][key] for one in of_windows] for key in of_windows[0][way]} for way in _WAYS}
    return {"switches": switches, "pasts": pasts, "windows": list(windows.shape), "read": options["read_tokens"]}


def _part_of_all(llm: SwitchableLLM, share: float) -> PruningMask:
    return PruningMask.from_widths(llm.shape, [round(share * n_parts) for n_parts in llm.shape.components.n_parts])


@torch.inference_mode()
def _logits(llm: SwitchableLLM, mask: PruningMask, window: torch.Tensor) -> torch.Tensor:
    with llm.pruned(mask):
        return llm.model(window[None, :64], use_cache=False).logits


def _switched(store: WeightStore, llm: SwitchableLLM, mask: PruningMask) -> dict[str, float]:
    """There and back again: bytes that left the process, that came back, and seconds."""
    process, whole = psutil.Process(), llm.mask
    first = process.memory_info().rss
    down, _ = timed(lambda: store.switch(mask))
    second = process.memory_info().rss
    up, _ = timed(lambda: store.switch(whole))
    return {
        "released_bytes": first - second,
        "restored_bytes": process.memory_info().rss - second,
        "down_seconds": down,
        "up_seconds": up,
    }


def _past(live: LiveModel, mask: PruningMask, window: torch.Tensor, n_read: int) -> dict[str, dict[str, float]]:
    """Tokens read with a mask; then all comes back. Seconds until the next token can be read, and the loss from then.

    The seconds are those of the cache alone; switching weights is measured apart.
    """
    tokens, dense = window.tolist(), PruningMask.all_kept(live.llm.shape)
    found = {}
    for way in _WAYS:
        live.switch(mask)
        cache = live.new_cache(len(tokens))
        live.read([(cache, tokens[:n_read])])
        if way != "stays pruned":
            live.switch(dense)
        started = time.perf_counter()
        if way == "exact":
            cache = live.new_cache(len(tokens))
            live.read([(cache, tokens[:n_read])])
        elif way != "stays pruned":
            cache.switch(live.heads, way)
        seconds = time.perf_counter() - started
        rows = [live.read([(cache, [token])])[0] for token in tokens[n_read:-1]]
        loss = torch.nn.functional.cross_entropy(torch.stack(rows).float(), window[n_read + 1 :])
        found[way] = {"seconds": seconds, "loss": loss.item()}
    live.switch(dense)
    return found


def lines(results: Mapping[str, Any]) -> list[str]:
    """What is printed; losses are of the tokens after those that were read before the switch."""
    printed = []
    for name, found in sorted(results["switches"].items(), reverse=True):
        n_bytes = found["dropped_bytes"]
        released, restored = (median(found[key]) / n_bytes for key in ("released_bytes", "restored_bytes"))
        down, up = (1000 * median(found[key]) for key in ("down_seconds", "up_seconds"))
        printed.append(
            f"{name} of each site kept, {n_bytes / 1e6:.1f} MB dropped ({n_bytes / found['weights_bytes']:.0%} of the"
            f" weights): {released:.1%} of them leave the process, {restored:.1%} come back; {down:.0f} ms down,"
            f" {up:.0f} ms up; logits equal: {found['equal_logits']}"
        )
    for name, of_ways in sorted(results["pasts"].items(), reverse=True):
        parts = (
            f"{way} {mean(of_ways[way]['loss']):.3f} after {1000 * median(of_ways[way]['seconds']):.0f} ms"
            for way in _WAYS
        )
        printed.append(f"{results['read']} tokens read with {name}, then all restored: loss {', '.join(parts)}")
    return printed
