"""A loss at widths between whole parts, and its gradient: one backward pass tells about the widths of all sites."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rap_env.errors import InvalidMask, InvalidWorkload, UnsupportedArchitecture
from rap_env.evaluation.claims import measured_once
from rap_env.evaluation.evaluator import check_finite
from rap_env.evaluation.identity import engine_identity
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.perplexity import BATCH_TOKENS, check_tokens, tokens_digest
from rap_env.evaluation.store import ResultStore, identity_digest
from rap_env.llm.architecture import architecture_of, submodule
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.widened import linears_widened
from rap_env.mask import PruningMask
from rap_env.rng import isolated_rng

PASSES = 3  # what a forward and a backward pass count as: the usual price of training
_EDGE = 3.0  # parts of a ramp of gates; see `soft_gates`
_FEW = 8
_HEAD_ROWS = 1024  # of logits that are alive at once, with their gradients
_VERSION = 1  # of how it is computed


class WidthGradients:
    """Reads windows at fractional widths, forward and backward, and pays for it.

    A site of width w hands its first parts to its output matrix whole, and of those about w what a gate between 0 and 1
    lets through; see `soft_gates`. At whole widths of sites with few parts this is the masked model, but for an output
    matrix's bias, which stays where the whole site goes.

    Shapes: B windows of T tokens, S sites.

    Args:
        llm: The model; the mask that is applied to it does not matter, and stays.
        store: Keeps finished passes; None keeps none.
        budget: What pays.

    Raises:
        UnsupportedArchitecture: Output matrices are quantised, or refitted for each width.
    """

    def __init__(self, llm: SwitchableLLM, store: ResultStore | None, budget: TokenBudget) -> None:
        self._llm, self._store, self._budget = llm, store, budget
        sites = llm.shape.components.sites
        self.n_parts = torch.tensor(llm.shape.components.n_parts, dtype=torch.float64)
        layers = [(llm.layer_of(site), site.kind) for site, _own in sites]
        self._outputs = [layer.output(kind) for layer, kind in layers]
        if llm.refits is not None or not all(type(output) is nn.Linear for output in self._outputs):
            raise UnsupportedArchitecture(
                "expected output matrices as they were loaded to differentiate through; these are quantised or refitted"
            )
        self._channels = [[own.stop - own.start for own in layer.output_slices(kind)] for layer, kind in layers]

    def tokens(self, windows: torch.Tensor) -> int:
        """What `measure` pays for windows [B, T]."""
        return PASSES * windows.numel()

    def measure(
        self, windows: torch.Tensor, widths: torch.Tensor, n_scored: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean next-token losses of windows, each at widths of its own, and their gradients.

        Args:
            windows: Tokens [B, T].
            widths: Between 0 and the number of a site's parts [B, S], in float64.
            n_scored: How many of the last tokens of each window the mean is over [B]; by default all but the first.

        Returns:
            Losses [B] in nats, and what one part more of each site changes them by [B, S], in float64.

        Raises:
            SearchExhausted: The token budget does not cover it.
            InvalidWorkload: The windows are longer than the model's context, have tokens that it doesn't know, or fewer
                than are to be scored.
            InvalidMask: The widths are not those of as many models as there are windows.
            EvaluationFailed: A loss or a gradient is not a finite number.
        """
        check_tokens(windows, self._llm)
        widths = widths.detach()
        if widths.shape != (len(windows), len(self.n_parts)) or not ((widths >= 0) & (widths <= self.n_parts)).all():
            raise InvalidMask(
                f"expected widths [{len(windows)}, {len(self.n_parts)}] within the sites' parts;"
                f" got {list(widths.shape)} of {widths.min().item()} to {widths.max().item()}"
            )
        most = windows.shape[1] - 1
        scored = [most] * len(windows) if n_scored is None else list(n_scored)
        if len(scored) != len(windows) or not all(1 <= own <= most for own in scored):
            raise InvalidWorkload(f"expected {len(windows)} numbers of scored tokens from 1 to {most}; got {scored}")
        identity = self._identity(windows, widths) | ({} if n_scored is None else {"n_scored": scored})
        paid = self._budget.spend("width gradients", [identity_digest(identity)], self.tokens(windows))

        def measured(_indices: list[int]) -> Iterator[tuple[int, dict]]:
            yield 0, self._measured(windows, widths, torch.tensor(scored))

        ((result,), _fresh) = measured_once(self._store, [identity], measured)
        self._budget.measured_seconds += result["seconds"] if paid else 0.0
        losses, slopes = (torch.tensor(result[name], dtype=torch.float64) for name in ("losses", "slopes"))
        return losses, slopes

    def _identity(self, windows: torch.Tensor, widths: torch.Tensor) -> dict:
        """Everything that a result depends on."""
        return engine_identity(self._llm) | {
            "kind": "width gradients",
            "windows": tokens_digest(windows),
            "widths": hashlib.sha256(np.ascontiguousarray(widths.numpy()).tobytes()).hexdigest(),
            "version": _VERSION,
        }

    def _measured(self, windows: torch.Tensor, widths: torch.Tensor, n_scored: torch.Tensor) -> dict:
        started, llm = time.perf_counter(), self._llm
        leaf, of_batches = widths.clone().requires_grad_(True), []
        per_batch = max(1, BATCH_TOKENS // windows.shape[1])
        whole = llm.pruned(PruningMask.all_kept(llm.shape))
        with isolated_rng(), torch.enable_grad(), whole, linears_widened(llm):
            batches = (each.split(per_batch) for each in (windows, leaf, n_scored))
            for batch, own, scored in zip(*batches, strict=True):
                with self._gated(own):
                    of_batches.append(self._backward(batch.to(llm.device), scored.to(llm.device)))
        losses, slopes = torch.cat(of_batches).tolist(), leaf.grad
        check_finite("loss at fractional widths", losses, llm)
        check_finite("gradient at fractional widths", slopes.flatten().tolist(), llm)
        return {"losses": losses, "slopes": slopes.tolist(), "seconds": time.perf_counter() - started}

    def _backward(self, windows: torch.Tensor, n_scored: torch.Tensor) -> torch.Tensor:
        """Losses [B] of windows over their last tokens [B], whose sum's gradient is added to that of the widths."""
        model, decoder = self._llm.model, architecture_of(self._llm.model.config).decoder
        states = submodule(model, decoder)(input_ids=windows, use_cache=False).last_hidden_state[:, :-1]
        losses, slopes = _head_losses(self._llm, states, windows[:, 1:], n_scored)
        states.backward(slopes)
        return losses

    @contextlib.contextmanager
    def _gated(self, widths: torch.Tensor) -> Iterator[None]:
        """Puts gates in front of all output matrices while the body runs."""
        handles = []
        try:
            for column, output, channels in zip(widths.T, self._outputs, self._channels, strict=True):
                gates = soft_gates(column, len(channels)).repeat_interleave(torch.tensor(channels), 1)
                handles.append(output.register_forward_pre_hook(_gate(gates)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def soft_gates(widths: torch.Tensor, n_parts: int) -> torch.Tensor:
    """Gates of a site's parts at widths: 1 below a width, 0 above it, and a ramp between them; they add up to it.

    The ramp is three parts long, so that a gradient is not that of a single part, and one part long where there are at
    most eight and near both ends: a width of 0 keeps nothing, one of all parts everything.

    Args:
        widths: Between 0 and the number of parts [B].
        n_parts: Of the site, P.

    Returns:
        Gates [B, P]; gradients go through them to the widths.
    """
    column = widths[:, None]
    if n_parts > _FEW:
        from_end = torch.minimum(column, n_parts - column)
        edge = torch.where(from_end < _EDGE / 2.0, 1.0, _EDGE)
    else:
        edge = torch.ones_like(column)
    middles = torch.arange(n_parts, dtype=widths.dtype, device=widths.device) + 0.5
    return ((column - middles) / edge + 0.5).clamp(0.0, 1.0)


def _gate(gates: torch.Tensor) -> Callable:
    """A hook that multiplies a matrix's inputs by gates [B, C]: inputs [B, T, C], or their rows [B * T, C]."""

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states, (n_windows, channels) = inputs[0], gates.shape
        factors = gates.to(states.device, states.dtype)[:, None]
        return ((states.reshape(n_windows, -1, channels) * factors).reshape(states.shape),)

    return hook


def _head_losses(
    llm: SwitchableLLM, states: torch.Tensor, targets: torch.Tensor, n_scored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean losses [B] of states [B, T, H] behind the last norm, and the gradient of their sum; some rows at a time."""
    n_targets = targets.shape[1]
    places = torch.arange(n_targets, device=targets.device)
    is_scored = (places >= n_targets - n_scored[:, None]).reshape(-1)
    divisors = n_scored.repeat_interleave(n_targets)[is_scored, None]
    rows, slopes = states.detach().reshape(-1, states.shape[-1]), torch.zeros_like(states)
    losses = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    of_rows, of_tokens = [], []
    parts = (each.split(_HEAD_ROWS) for each in (rows[is_scored], targets.reshape(-1)[is_scored], divisors))
    for part, wanted, divisor in zip(*parts, strict=True):
        leaf = part.clone().requires_grad_(True)
        found = functional.cross_entropy(llm.model.lm_head(leaf).float(), wanted, reduction="none")
        found.sum().backward()
        of_tokens.append(found.detach().double())
        of_rows.append((leaf.grad.float() / divisor).to(leaf.dtype))
    losses[is_scored] = torch.cat(of_tokens)
    slopes.view(rows.shape)[is_scored] = torch.cat(of_rows)
    return (losses.view(targets.shape).sum(1) / n_scored).cpu(), slopes
