"""A live model on a GPU: weights that leave its memory and come back, generation under masks, number formats."""

import gc
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from experiments.benchmarks.generation import generated, read_together
from experiments.benchmarks.timing import alternate, speedup, timed
from rap_env.llm.formats import put_matrices, quantise, site_matrices
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_random_llm, build_tiny_llm
from rap_env.llm.quantised import QuantisedLinear
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.serving.readings import free_bytes

_FORMATS = (("int8", "full"), ("int4", "full"), ("int4g32", "full"), ("int8", "int8"))
_PROMPT_TOKENS, _NEW_TOKENS = 512, 32
_SIZES = {  # a small model that INT4 takes
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}


def live(model: SwitchableLLM, repeats: int) -> dict[str, Any]:
    """All parts.

    Args:
        model: With random weights, on the device to check; as before in the end.
        repeats: How often each way is timed.
    """
    llm = SwitchableLLM(model.model, model.tokenizer, model.name, "group")
    tokens = random_tokens(llm, _PROMPT_TOKENS // 8 if llm.shape.context_tokens < 1024 else _PROMPT_TOKENS)
    return {
        "exactness": generation_exactness(llm.device.type),
        "formats": {
            f"{weights}, {cache} cache": formats(weights, cache, llm.device.type) for weights, cache in _FORMATS
        },
        "switching": switching(llm, tokens, repeats),
        "decoding": decoding(llm, tokens, repeats),
    }


@torch.inference_mode()
def generation_exactness(device: str) -> dict[str, Any]:
    """A tiny random model in float32: sequences read together against `generate` for each."""
    llm = build_tiny_llm(device=device)
    prompts = [random_tokens(llm, length, seed=length) for length in (3, 9, 17)]
    together = read_together(LiveModel(llm), prompts, 8)
    alone = [generated(llm, [prompt], 8)[0] for prompt in prompts]
    return {"sequences": len(prompts), "tokens_equal": together == alone}


@torch.inference_mode()
def formats(weights: str, kv_cache: str, device: str) -> dict[str, Any]:
    """A small random model in a number format, against one that has the numbers that these stand for."""
    llm = build_random_llm("llama", _SIZES, dtype="float32", device=device)
    tokens = torch.tensor([random_tokens(llm, 48)], device=device)
    quantise(llm.model, weights, kv_cache)
    quantised = llm.model(tokens, use_cache=False).logits
    sites = site_matrices(llm.model)
    put_matrices(llm.model, {site: {path: _plain(own) for path, own in sites[site].items()} for site in sites})
    exact = llm.model(tokens, use_cache=False).logits
    return {"largest_logit_difference": (quantised - exact).abs().max().item(), "logit_scale": exact.std().item()}


def _plain(matrix: QuantisedLinear) -> nn.Linear:
    """A layer with the numbers that a quantised one stands for."""
    linear = nn.Linear(matrix.in_features, matrix.out_features, bias=False, device=matrix.weight.device)
    linear.weight.copy_(matrix.matrix(slice(0, matrix.out_features)).t())
    return linear


def switching(llm: SwitchableLLM, tokens: Sequence[int], repeats: int) -> dict[str, Any]:
    """Bytes that leave the device's allocator and come back with each mask, seconds, and whether bits stay."""
    building_seconds, store = timed(lambda: WeightStore(llm))
    dense, results = PruningMask.all_kept(llm.shape), {}
    before_logits = last_logits(llm, tokens)
    for name, mask in masks_of(llm).items():
        down, up, freed, read = [], [], [], []
        for _ in range(repeats):
            allocated, free = allocated_bytes(llm), free_bytes(llm.device)
            down.append(timed(lambda mask=mask: store.switch(mask))[0])
            freed.append(allocated - allocated_bytes(llm))
            read.append(free_bytes(llm.device) - free)
            up.append(timed(lambda: store.switch(dense))[0])
        results[name] = {
            "weight_bytes": sum(component.weight_bytes for component in mask.kept),
            "freed_bytes": store.freed_bytes(mask),
            "left_allocator_bytes": freed,
            "read_as_free_bytes": read,
            "down_seconds": down,
            "up_seconds": up,
            "logits_equal": torch.equal(last_logits(llm, tokens), before_logits),
        }
    llm.weights_changed()
    return {"building_seconds": building_seconds, "masks": results}


def decoding(llm: SwitchableLLM, tokens: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds of generating with one and eight sequences, dense by `generate` and live under each mask."""
    masks = {"dense": PruningMask.all_kept(llm.shape)} | masks_of(llm)
    live_model, results = LiveModel(llm), {}
    for n_sequences in (1, 8):
        prompts = [list(tokens)] * n_sequences

        def read(mask: PruningMask, prompts=prompts) -> Callable[[int], Any]:
            def run(_repeat: int) -> None:
                live_model.switch(mask)
                read_together(live_model, prompts, _NEW_TOKENS)

            return run

        live_model.switch(masks["dense"])
        plain, _ = alternate({"generate": lambda _, prompts=prompts: generated(llm, prompts, _NEW_TOKENS)}, repeats + 1)
        seconds, _ = alternate({name: read(mask) for name, mask in masks.items()}, repeats + 1)
        live_model.switch(masks["dense"])
        results[f"{n_sequences} sequences"] = {
            "generate_seconds": plain["generate"][1:],
            "against_generate": speedup(plain["generate"][1:], seconds["dense"][1:]),
            "against_dense": {name: speedup(seconds["dense"][1:], own[1:]) for name, own in seconds.items()},
        }
    return results


def masks_of(llm: SwitchableLLM) -> dict[str, PruningMask]:
    """The first 70% of the parts of each site, and 70% of the layers."""
    dense = PruningMask.all_kept(llm.shape)
    widths = [round(0.7 * len(bits)) for _site, bits in dense.kept_parts]
    dropped = range(llm.shape.n_layers - round(0.3 * llm.shape.n_layers), llm.shape.n_layers)
    layers = [component for component in dense.components if component.site.layer in dropped]
    return {
        "70% of each site": PruningMask.from_widths(llm.shape, widths),
        "70% of the layers": dense.drop(*layers),
    }


@torch.inference_mode()
def last_logits(llm: SwitchableLLM, tokens: Sequence[int]) -> torch.Tensor:
    return llm.model(torch.tensor([list(tokens)], device=llm.device), use_cache=False, logits_to_keep=1).logits


def random_tokens(llm: SwitchableLLM, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, llm.shape.vocab_size - 1, (length,), generator=generator).tolist()


def allocated_bytes(llm: SwitchableLLM) -> int:
    """Of the device's allocator; 0 on a CPU, which has none to ask."""
    gc.collect()
    return torch.cuda.memory_allocated(llm.device) if llm.device.type == "cuda" else 0


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    exactness = results["exactness"]
    printed = [f"{exactness['sequences']} sequences read together generate what each does: {exactness['tokens_equal']}"]
    for name, entry in results["formats"].items():
        difference = entry["largest_logit_difference"] / entry["logit_scale"]
        printed.append(f"{name}: logits within {difference:.1e} of their spread of those of the numbers in float32")
    for name, entry in results["switching"]["masks"].items():
        left = sum(entry["left_allocator_bytes"]) / len(entry["left_allocator_bytes"])
        milliseconds = [1000 * median(entry[way]) for way in ("down_seconds", "up_seconds")]
        printed.append(
            f"{name}: {left / 1e9:.3f} GB leave the GPU, {entry['freed_bytes'] / 1e9:.3f} GB predicted;"
            f" {milliseconds[0]:.0f} ms down, {milliseconds[1]:.0f} ms up; logits equal: {entry['logits_equal']}"
        )
    for name, entry in results["decoding"].items():
        ratios = ", ".join(
            f"{mask} {1 / own['ratio']:.2f}" for mask, own in entry["against_dense"].items() if mask != "dense"
        )
        printed.append(
            f"decoding {name}: {entry['against_generate']['ratio']:.2f} times as fast as generate; of dense: {ratios}"
        )
    return printed
