"""What reaches the output matrix of each site on calibration text; parts are ordered and refitted by it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from rap_env.components import Site
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.windows import check_windows

_BATCH_TOKENS = 4096  # forwarded at once


@dataclass(frozen=True)
class InputStatistics:
    """Of the inputs X [n tokens, C channels] of a site's output matrix (`o_proj`, `down_proj`), in float32.

    Attributes:
        n_tokens: How many tokens n.
        mean: Mean of each channel [C].
        second_moment: Mean square of each channel [C].
        window_norm: Norm of each channel over a window's tokens, mean over the windows [C].
        gram: X^T X / n [C, C]; None where it was not asked for.
    """

    n_tokens: int
    mean: torch.Tensor
    second_moment: torch.Tensor
    window_norm: torch.Tensor
    gram: torch.Tensor | None

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each channel [C]."""
        return (self.second_moment - self.mean.square()).clamp(min=0.0)

    def reordered(self, places: torch.Tensor) -> "InputStatistics":
        """The same for inputs in another order; `places` [C] says where each stood before."""
        vectors = (vector[places] for vector in (self.mean, self.second_moment, self.window_norm))
        return InputStatistics(self.n_tokens, *vectors, None if self.gram is None else self.gram[places][:, places])


def merged(first: InputStatistics, second: InputStatistics) -> InputStatistics:
    """Those of two texts together; both have gram matrices, or neither."""
    n_tokens = first.n_tokens + second.n_tokens
    values = {
        name: None if value is None else (first.n_tokens * value + second.n_tokens * vars(second)[name]) / n_tokens
        for name, value in vars(first).items()
    }
    return InputStatistics(**values | {"n_tokens": n_tokens})


def input_statistics(
    llm: SwitchableLLM, windows: torch.Tensor, gram: bool = False
) -> Iterator[tuple[Site, InputStatistics]]:
    """Runs the dense model over windows of text, one site after another; holds one site's statistics at a time.

    Args:
        llm: The model; the mask that is applied to it does not matter, and stays.
        windows: Calibration tokens [N, T].
        gram: Whether second moments between channels are wanted, C x C float32 numbers for a site.

    Raises:
        InvalidWorkload: There are no windows, no token to predict, or they are longer than the model's context.
    """
    check_windows(*windows.shape, llm.shape.context_tokens)
    per_batch = max(1, _BATCH_TOKENS // windows.shape[1])
    streams = [llm.open_stream(batch.to(llm.device)) for batch in windows.split(per_batch)]
    for site in llm.shape.sites:
        layer, sums = llm.layer_of(site), _Sums(windows.shape[1], gram)
        handle = layer.output(site.kind).register_forward_pre_hook(sums.add)
        try:
            with torch.inference_mode():  # not `llm.run`: its lanes would add up in an order that changes
                streams = [(layer.run(site.kind, hidden, context), context) for hidden, context in streams]
        finally:
            handle.remove()
        yield site, sums.statistics(windows.numel(), len(windows))


class _Sums:
    """Adds up what a forward pre-hook sees of windows of T tokens."""

    def __init__(self, tokens: int, gram: bool) -> None:
        self._tokens, self._with_gram = tokens, gram
        self._values = self._squares = self._norms = self._products = 0.0

    def add(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].float().view(-1, self._tokens, inputs[0].shape[-1])  # [B, T, C]
        squares = rows.square().sum(1)
        self._values += rows.sum((0, 1))
        self._squares += squares.sum(0)
        self._norms += squares.sqrt().sum(0)
        if self._with_gram:
            flat = rows.flatten(0, 1)
            self._products += flat.T @ flat

    def statistics(self, n_tokens: int, n_windows: int) -> InputStatistics:
        gram = self._products / n_tokens if self._with_gram else None
        return InputStatistics(
            n_tokens, self._values / n_tokens, self._squares / n_tokens, self._norms / n_windows, gram
        )
