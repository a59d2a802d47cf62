"""A check of what runs on a GPU: `python -m scripts.gpu_check`; exactness, memory against the formula, speed.

Needs torch, transformers, safetensors, gymnasium and psutil, and no network: weights are random and made on the card.
"""

import platform
import random
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.nn.functional import log_softmax

from experiments.benchmarks.gpu_live import lines as live_lines
from experiments.benchmarks.gpu_live import live
from experiments.benchmarks.timing import alternate, forward_flops, gemm_flops_per_second, plain_loss, speedup
from rap_env.components import ATTENTION, MLP, Site
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.scoring import Pair, ScoringPlan
from rap_env.llm.architecture import ARCHITECTURES
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.shape import GRANULARITIES
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload

GB = 1e9
# The masks that RAP publishes for 80% and 60% of the memory (arXiv 2505.17138), and its measured peaks at 8 x 2048.
RAP_MASKS = {
    "dense": ((), ()),
    "80%": ((18, 19, 21, 23, 24, 25, 27, 28, 30), (13, 22, 24, 27)),
    "60%": ((8, 10, 12, 13, 14, 18, 19, 21, 22, 23, 24, 25, 27, 28, 30), (7, 8, 9, 12, 13, 18, 20, 22, 24, 26, 27)),
}
PUBLISHED_GB = {"dense": 23.70, "80%": 18.45, "60%": 13.61}


def check(llm: SwitchableLLM, workload: Workload, repeats: int = 3) -> dict[str, Any]:
    """Runs all parts on the device where a model is.

    Args:
        llm: The model of the memory and speed parts, with random weights; what RAP's masks drop of it is released.
        workload: The request batch of the memory part.
        repeats: How often each way is timed.
    """
    device = llm.device.type
    return {
        "exactness": {
            f"{family}, {granularity}s": exactness(family, device, granularity)
            for family in ARCHITECTURES
            for granularity in GRANULARITIES
        },
        "speed": speed(llm, repeats),  # while the model is whole
        "live": live(llm, repeats),
        "memory": memory(llm, workload),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "repeats": repeats,
    }


@torch.inference_mode()
def exactness(family: str, device: str, granularity: str) -> dict[str, Any]:
    """A tiny random model in float32: our ways of running a mask against upstream's forward of the switched model."""
    llm = build_tiny_llm(family, device=device)
    llm = SwitchableLLM(llm.model, llm.tokenizer, llm.name, granularity)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (4, 48), generator=generator).to(device)
    bits = torch.rand(12, len(llm.shape.components), generator=generator) < 0.7
    masks = list(dict.fromkeys(PruningMask.from_bits(llm.shape, row.int()) for row in bits))
    before, expected = llm.model(tokens, use_cache=False).logits, {}
    for mask in masks:
        with llm.pruned(mask):
            expected[mask] = llm.model(tokens, use_cache=False).logits
    opened = llm.open_stream(tokens)
    together = {mask: llm.logits(stream) for mask, stream in llm.run_masks(masks, *opened)}
    alone = {mask: llm.logits(next(llm.run_masks([mask], *opened))[1]) for mask in masks}
    pairs = random_pairs(24, 256)
    scored = dict(ScoringPlan(pairs, 512).run(llm, masks[:2]))
    differences = []
    for mask, scores in scored.items():
        with llm.pruned(mask):
            plain = plain_scores(llm, pairs, 8)
        differences += [abs(ours - theirs) for (ours, _), (theirs, _) in zip(scores, plain, strict=True)]
    return {
        "masks": len(masks),
        "largest_logit_difference": max((expected[m] - together[m]).abs().max().item() for m in masks),
        "together_equal_alone": all(torch.equal(together[mask], alone[mask]) for mask in masks),
        "largest_log_likelihood_difference": max(differences),
        "dense_again_equal": torch.equal(before, llm.model(tokens, use_cache=False).logits),
    }


@torch.inference_mode()
def memory(llm: SwitchableLLM, workload: Workload) -> dict[str, Any]:
    """Predicted against allocated peaks while a prompt is read, for the dense model and RAP's two masks.

    On a CPU there is no allocator to ask, so only the prediction is given.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, llm.shape.vocab_size, (workload.batch_size, workload.prompt_tokens), generator=generator)
    results = {}
    for name, (attentions, mlps) in RAP_MASKS.items():
        sites = [(layer, ATTENTION) for layer in attentions] + [(layer, MLP) for layer in mlps]
        depth = llm.shape.n_layers / 32  # of a model with other layers, those at the same depth
        mask = PruningMask.all_kept(llm.shape).drop(*(Site(int(layer * depth), kind) for layer, kind in sites))
        predicted = footprint(llm.shape, mask, workload)
        measured_bytes = None
        for component in mask.dropped:
            for parameter in llm.parameters_of(component.site):
                parameter.data = parameter.data.new_empty(0)
        with llm.pruned(mask):
            if llm.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            cache = llm.model(tokens.to(llm.device), use_cache=True, logits_to_keep=1).past_key_values
            if llm.device.type == "cuda":
                measured_bytes = torch.cuda.max_memory_allocated()
        results[name] = {
            "predicted_peak_gb": predicted.peak_bytes / GB,
            "predicted_total_gb": predicted.total_bytes / GB,
            "measured_gb": None if measured_bytes is None else measured_bytes / GB,
            "published_gb": PUBLISHED_GB[name],
            "kv_cache_equal": predicted.kv_cache_bytes
            == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None),
        }
        del cache
    return results


def speed(llm: SwitchableLLM, repeats: int) -> dict[str, Any]:
    """Seconds of a round of importance, a population and scoring: plain transformers and ours in turn."""
    gemm = gemm_flops_per_second(llm)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, llm.shape.vocab_size, (4, min(256, llm.shape.context_tokens)), generator=generator)
    evaluator, dense = PerplexityEvaluator(windows, "random"), PruningMask.all_kept(llm.shape)
    parent, rng = dense.drop(*dense.components[1::4]), random.Random(0)
    swaps = ((rng.choice(parent.kept), rng.choice(parent.dropped)) for _ in range(64))
    population = list({parent.drop(dropped).restore(restored) for dropped, restored in swaps})[:32]
    pairs = random_pairs(128, llm.shape.vocab_size)
    plan = ScoringPlan(pairs, 8192)

    def plain_losses(masks: Sequence[PruningMask]) -> list[float]:
        return [plain_loss(llm, windows, mask) for mask in masks]

    def ours(masks: Sequence[PruningMask]) -> list[float]:
        scores = dict(evaluator.evaluate_many(llm, masks))
        return [-scores[mask].score for mask in masks]

    def one_by_one(masks: Sequence[PruningMask]) -> list[float]:
        return [-next(evaluator.evaluate_many(llm, [mask]))[1].score for mask in masks]

    removals = [dense.drop(component) for component in dense.components]
    loss_ways = {"plain": plain_losses, "one by one": one_by_one, "ours": ours}
    score_ways = {
        "plain": lambda _: [score for score, _greedy in plain_scores(llm, pairs, 32)],
        "ours": lambda _: [score for score, _greedy in next(plan.run(llm, [dense]))[1]],
    }
    results = {
        "forward": _race(loss_ways, [dense], repeats),
        "importance round": _race(loss_ways, removals, repeats),
        "population of 32": _race(loss_ways, population, repeats),
        "scoring": _race(score_ways, None, repeats),
    }
    sizes = {"forward": (windows.numel(), windows.numel()), "scoring": (plan.tokens, plan.head_rows)}
    for name, (tokens, head_rows) in sizes.items():
        seconds = median(results[name]["speedup"]["our_seconds"])
        results[name]["share_of_gemm"] = forward_flops(llm, dense, tokens, head_rows) / seconds / gemm
    return results | {"gemm_flops_per_second": gemm}


def _race(ways: dict[str, Callable], argument: Any, repeats: int) -> dict[str, Any]:
    calls = {name: lambda _repeat, way=way: way(argument) for name, way in ways.items()}
    alternate(calls, 1)  # the first calls allocate
    seconds, results = alternate(calls, repeats)
    differences = [abs(a - b) for a, b in zip(results["plain"][0], results["ours"][0], strict=True)]
    entry = {"speedup": speedup(seconds["plain"], seconds["ours"]), "largest_difference": max(differences)}
    if "one by one" in seconds:
        entry["from_sharing"] = speedup(seconds["one by one"], seconds["ours"])
    return entry


def random_pairs(n_items: int, vocab_size: int) -> list[Pair]:
    """Items of four choices behind contexts of 20 to 100 tokens."""
    rng, pairs = random.Random(0), []

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(n))

    for _ in range(n_items):
        context = tokens(rng.randint(20, 100))
        pairs += [(context, tokens(rng.randint(1, 8))) for _choice in range(4)]
    return pairs


@torch.inference_mode()
def plain_scores(llm: SwitchableLLM, pairs: Sequence[Pair], batch_size: int) -> list[tuple[float, bool]]:
    """Log-likelihoods as evaluation scripts take them: padded batches in order of length, all logits."""
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        rows = [torch.tensor(pairs[index][0] + pairs[index][1][:-1]) for index in indices]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(llm.device)
        logits = llm.model(batch, use_cache=False).logits
        for row, index in enumerate(indices):
            context, continuation = pairs[index]
            span = slice(len(context) - 1, len(context) - 1 + len(continuation))
            logprobs = log_softmax(logits[row, span].float(), dim=-1)
            wanted = torch.tensor(continuation, device=llm.device)
            greedy = bool((logprobs.argmax(-1) == wanted).all())
            scores[index] = logprobs.gather(1, wanted[:, None]).sum().item(), greedy
    return scores


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    printed = [f"device: {results['device']}"]
    for family, entry in results["exactness"].items():
        printed.append(
            f"{family}: logits within {entry['largest_logit_difference']:.1e} of upstream's, together equal to alone:"
            f" {entry['together_equal_alone']}, log-likelihoods within {entry['largest_log_likelihood_difference']:.1e}"
        )
    for name, entry in results["memory"].items():
        measured = "not measured" if entry["measured_gb"] is None else f"{entry['measured_gb']:.2f} GB measured"
        printed.append(
            f"{name}: {entry['predicted_peak_gb']:.2f} GB of weights and KV cache, {entry['predicted_total_gb']:.2f} GB"
            f" with activations; {measured}; published for Llama-2-7B at 8 x 2048: {entry['published_gb']:.2f} GB"
        )
    for name in ("forward", "importance round", "population of 32", "scoring"):
        entry = results["speed"][name]
        shared = f", {_ratio(entry['from_sharing'])} times as one by one" if "from_sharing" in entry else ""
        share = f"; {entry['share_of_gemm']:.0%} of the GEMM rate" if "share_of_gemm" in entry else ""
        printed.append(f"{name}: {_ratio(entry['speedup'])} times as fast as plain transformers{shared}{share}")
    return printed + live_lines(results["live"])


def _ratio(speedup: dict[str, Any]) -> str:
    """The median, and from where to where the repeats reach."""
    return f"{speedup['ratio']:.2f} [{min(speedup['ratios']):.2f}, {max(speedup['ratios']):.2f}]"
