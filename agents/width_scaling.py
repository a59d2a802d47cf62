"""What policies of widths are trained through: actions scaled to a memory budget, as the nested projection does it."""

from collections.abc import Sequence

import numpy as np
import torch

from rap_env.mask import PruningMask
from rap_env.memory.footprint import smallest_bytes
from rap_env.memory.projection import NESTED, Projection, site_bytes
from rap_env.memory.scenario import Scenario
from rap_env.observation import observe_widths

_LEAST = 1e-12  # keep fraction: a site may go, and orders by fractions stay defined
_HALVINGS = 60
SCALED = Projection(NESTED, _LEAST, "affine")  # what serves the actions


def scaled_fractions(actions: torch.Tensor, sizes: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Keep fractions [B, S] of actions between -1 and 1 [B, S], but for rounding those of `SCALED`."""
    return scaled_to_fit(((actions + 1.0) / 2.0).clamp(min=_LEAST), sizes, room)


def scaled_to_fit(fractions: torch.Tensor, sizes: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Keep fractions of S sites, scaled by one number for each of B contexts so that they take all bytes there are.

    Args:
        fractions: Above 0 [B, S].
        sizes: Bytes of whole sites [B, S].
        room: Bytes that all sites may take [B], less than their sum.

    Returns:
        Fractions of at most 1 [B, S]; gradients go through the scaling.
    """
    with torch.no_grad():
        low, high = torch.zeros_like(room), 1.0 / fractions.amin(1)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            over = ((fractions * middle[:, None]).clamp(max=1.0) * sizes).sum(1) > room
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        whole = fractions * low[:, None] >= 1.0
    of_whole, of_others = (sizes * whole).sum(1), (sizes * fractions * ~whole).sum(1)
    scale = (room - of_whole) / of_others.clamp(min=_LEAST)
    return torch.where(whole, torch.ones_like(fractions), fractions * scale[:, None]).clamp(max=1.0)


def family_inputs(
    shape, scenarios: Sequence[Scenario], kinds: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Observation entries [N, size], bytes that sites may take [N] and those of whole sites [N, S]."""
    dense = PruningMask.all_kept(shape)
    observations = [observe_widths(shape, scenario, dense, kinds) for scenario in scenarios]
    entries = {name: torch.from_numpy(np.stack([each[name] for each in observations])) for name in observations[0]}
    rooms = [each.budget_bytes - smallest_bytes(shape, each.workload) for each in scenarios]
    tokens = [each.workload.cached_tokens(shape.attention_window) for each in scenarios]
    sizes = np.stack([site_bytes(shape, cached)[:, -1] for cached in tokens])
    return entries, torch.tensor(rooms, dtype=torch.float64), torch.from_numpy(sizes).double()
