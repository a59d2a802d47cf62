"""Recovery: a pruned model learns a little text again (LoRA, merged), and is refused if that did not help."""

import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn

from rap_env.errors import ExportRefused
from rap_env.export import hf
from rap_env.export.pruned import PrunedModel
from rap_env.rng import isolated_rng

_HELD_OUT = 0.1  # share of the windows, from the text's end, that nothing is learned from
_MOST_HELD_OUT = 32
_GENERATED_TOKENS = 32
# Of the tokens generated greedily, how many differ at least: small models repeat phrases, broken ones a token or two.
MIN_DISTINCT = 0.1


@dataclass(frozen=True)
class Recovery:
    """What is learned, and how.

    Attributes:
        text: Plain text.
        steps: Steps of AdamW.
        batch_size: Windows for each step.
        window_tokens: Tokens of a window.
        rank: Of the LoRA matrices, which are added to every matrix in the layers.
        learning_rate: Constant.
        seed: Of the LoRA matrices and of the order of the windows.
    """

    text: str
    steps: int
    batch_size: int = 4
    window_tokens: int = 128
    rank: int = 8
    learning_rate: float = 2e-4
    seed: int = 0


@dataclass(frozen=True)
class Recovered:
    """A recovered model, and its mean loss for each token of the held-out text before and after."""

    model: PrunedModel
    loss_before: float
    loss_after: float


def recovered(pruned: PrunedModel, recovery: Recovery) -> Recovered:
    """Trains LoRA matrices on text and merges them.

    Raises:
        ExportRefused: `peft` is not installed, the text is too short, the loss on held-out text did not fall, or what
            the model generates then is a token or two over and over.
    """
    if importlib.util.find_spec("peft") is None:
        raise ExportRefused("recovery needs the package peft: pip install 'rap-env[export]'")
    if recovery.steps < 1:
        raise ExportRefused(f"expected at least 1 step of recovery; got {recovery.steps}")
    learned, held_out = _windows(pruned, recovery)
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / "pruned"
        inner.mkdir()
        hf.write(pruned, inner)
        model = hf.load(inner, torch.float32).to(pruned.device)
    before = _loss(hf.in_type(model, pruned.dtype), held_out)
    with isolated_rng(recovery.seed):
        model = _trained(hf.in_type(model, torch.float32), learned, recovery)
    model = hf.in_type(model, pruned.dtype).eval()
    after = _loss(model, held_out)
    if not after < before:  # also where it is not a number
        raise ExportRefused(
            f"recovery made the model no better: loss on held-out text {before:.4f} before, {after:.4f} after"
            f" {recovery.steps} steps; nothing was written: take more text, or export without recovery"
        )
    _check_generation(model, held_out)
    with torch.inference_mode():
        logits = model(pruned.tokens.to(model.device), use_cache=False).logits.float().cpu()
    return Recovered(pruned.with_state(model.state_dict(), logits), before, after)


def _windows(pruned: PrunedModel, recovery: Recovery) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [N, T] to learn from, and held-out ones from the text's end."""
    tokens = torch.tensor(pruned.tokenizer(recovery.text).input_ids, device=pruned.device)
    size = recovery.window_tokens
    windows = tokens[: len(tokens) // size * size].view(-1, size)
    if len(windows) < 2:
        raise ExportRefused(f"expected text of at least {2 * size} tokens for recovery; got {len(tokens)}")
    n_held_out = min(max(1, int(_HELD_OUT * len(windows))), _MOST_HELD_OUT)
    return windows[:-n_held_out], windows[-n_held_out:]


def _loss(model: nn.Module, windows: torch.Tensor) -> float:
    with torch.inference_mode():
        return sum(_mean_loss(model, window[None]).item() for window in windows) / len(windows)


def _mean_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _trained(model: nn.Module, windows: torch.Tensor, recovery: Recovery) -> nn.Module:
    """Trains in float32, because steps this small vanish in bfloat16."""
    import peft

    matrices = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = peft.LoraConfig(
        r=recovery.rank, lora_alpha=2 * recovery.rank, target_modules=sorted(matrices - {"lm_head"})
    )
    with warnings.catch_warnings():  # it asks transformers for what that calls by another name now
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recovery.learning_rate)
    order = torch.randperm(len(windows)).tolist()
    for batch in islice(_batches(order, recovery.batch_size), recovery.steps):
        _mean_loss(model, windows[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload()


def _batches(order: Sequence[int], size: int):
    windows = cycle(order)
    while True:
        yield list(islice(windows, size))


def _check_generation(model: nn.Module, held_out: torch.Tensor) -> None:
    prompt = held_out[:1, : held_out.shape[1] // 4]
    tokens = prompt
    with torch.inference_mode():
        for _ in range(_GENERATED_TOKENS):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    distinct = len(set(tokens[0, prompt.shape[1] :].tolist())) / _GENERATED_TOKENS
    if distinct < MIN_DISTINCT:
        raise ExportRefused(
            f"the recovered model repeats itself: {distinct:.0%} of {_GENERATED_TOKENS} generated tokens differ,"
            f" expected at least {MIN_DISTINCT:.0%}; nothing was written"
        )
