"""The memory model: bytes that a masked model needs for a workload. Pure arithmetic on a `ModelShape`."""

import functools
import operator
from dataclasses import dataclass

from rap_env.errors import InfeasibleBudget, InvalidMask
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload


@dataclass(frozen=True)
class Footprint:
    """Predicted bytes; see `footprint` for the formulas.

    Attributes:
        weights_bytes: Embedding, head, norms and the kept components.
        kv_cache_bytes: Keys and values of the kept attentions over all tokens of the workload.
        activation_bytes: Transient tensors of the widest kept sub-block while the prompt is read.
    """

    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Weights + KV cache, which is RAP's peak (arXiv 2505.17138) and what a memory budget is compared with."""
        return self.weights_bytes + self.kv_cache_bytes

    @property
    def total_bytes(self) -> int:
        """Peak + activations: what a process must be able to allocate when the prompt is read in one piece."""
        return self.peak_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, int]:
        return {**vars(self), "peak_bytes": self.peak_bytes}


def footprint(shape, mask: PruningMask, workload: Workload) -> Footprint:
    """Predicts the bytes of a masked model: one sum over the rows of what is kept.

    With `B` sequences of `T` prompt tokens, `b` bytes an activation and `h` the hidden size:

        weights     = fixed bytes + weight bytes of the kept components
        KV cache    = KV bytes per token of the kept components * cached tokens
        activations = b * B * T * (4 * h + width) + 4 * B * vocabulary

    Fixed are the embedding, an untied head, and the norms, which stay resident. Cached tokens are `B * (T + generated
    tokens)`, or what a sliding window leaves of them. Of the four tensors of the hidden size, upstream's frames keep
    two, the embedded tokens and the layer's input, while a site holds the residual stream and its norm. `width` is what
    the widest kept site holds beside them for each token: queries, keys, values and output of an attention
    (scores are never materialised), or gate, up and product of an MLP. The head's logits are float32, for the last
    position only. With rows counted from a Llama the first two lines are RAP's memory model (arXiv 2505.17138, section
    on the memory model).

    Args:
        shape: A `ModelShape`.
        mask: Keep-bits over the shape's components.
        workload: The request batch.

    Raises:
        InvalidMask: The mask's components are not the shape's.
        InvalidWorkload: A sequence is longer than the model's context.
    """
    workload.check_context(shape.context_tokens)
    if mask.components is not shape.components and mask.components != shape.components:
        raise InvalidMask(f"expected a mask over this model's {len(shape.components)} components; got {len(mask.keep)}")
    return Footprint(
        weights_bytes=shape.fixed_bytes + mask.weight_bytes,
        kv_cache_bytes=mask.kv_bytes_per_token * workload.cached_tokens(shape.attention_window),
        activation_bytes=activation_bytes(
            shape, mask, workload.batch_size * workload.prompt_tokens, workload.batch_size
        ),
    )


def activation_bytes(shape, mask: PruningMask, n_tokens: int, n_sequences: int) -> int:
    """Bytes of the transient tensors while tokens are read at once; see `footprint`.

    Args:
        shape: A `ModelShape`.
        mask: Keep-bits over the shape's components.
        n_tokens: Tokens that are read at once, of all sequences together.
        n_sequences: Sequences of which the next token is wanted.
    """
    widths = map(operator.getitem, _activation_widths(shape), mask.n_kept)
    read_bytes = shape.bytes_per_parameter * n_tokens * (4 * shape.hidden_size + max(widths))
    return read_bytes + 4 * n_sequences * shape.vocab_size


@functools.lru_cache(maxsize=32)
def _activation_widths(shape) -> tuple[tuple[int, ...], ...]:
    """Channels of each site that keeps 0, 1, ... parts."""
    whole = ((shape.activation_width(site.kind), place.stop - place.start) for site, place in shape.components.sites)
    return tuple(tuple(width * n // n_parts for n in range(n_parts + 1)) for width, n_parts in whole)


@functools.lru_cache(maxsize=256)
def component_bytes(shape, workload: Workload) -> tuple[int, ...]:
    """Peak bytes that dropping each component frees at a workload, in component order.

    A footprint is a sum over rows, so these are exact for every mask.
    """
    tokens = workload.cached_tokens(shape.attention_window)
    return tuple(weights + kv_bytes * tokens for weights, kv_bytes in zip(*shape.components.costs, strict=True))


def bytes_by_name(shape, workload: Workload) -> dict[str, int]:
    """The same by component name."""
    names = (component.name for component in shape.components)
    return dict(zip(names, component_bytes(shape, workload), strict=True))


def smallest_bytes(shape, workload: Workload) -> int:
    """Peak bytes with every component dropped: the smallest budget that any mask can meet.

    Raises:
        InvalidWorkload: A sequence is longer than the model's context.
    """
    workload.check_context(shape.context_tokens)
    return shape.fixed_bytes


def check_feasible(shape, workload: Workload, budget_bytes: float) -> None:
    """Refuses a budget that no mask can meet.

    Raises:
        InfeasibleBudget: Even with every component dropped the footprint exceeds the budget, or it is NaN.
        InvalidWorkload: The workload is beyond the model's context.
    """
    smallest = smallest_bytes(shape, workload)
    if not budget_bytes >= smallest:  # so that NaN is refused too
        raise InfeasibleBudget(budget_bytes, smallest, workload)


def dense_bytes(shape, workload: Workload) -> int:
    """Peak bytes of the unpruned model; a `budget_ratio` is a fraction of it.

    Raises:
        InvalidWorkload: A sequence is longer than the model's context.
    """
    weights, kv_bytes_per_token = _all_costs(shape)
    tokens = workload.cached_tokens(shape.attention_window)
    return smallest_bytes(shape, workload) + weights + kv_bytes_per_token * tokens


@functools.lru_cache(maxsize=32)
def _all_costs(shape) -> tuple[int, int]:
    """Weight bytes, and KV bytes per token, of all components together."""
    weights, kv_bytes_per_token = shape.components.costs
    return sum(weights), sum(kv_bytes_per_token)
