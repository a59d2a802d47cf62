"""What a model may have been given beside its weights: an order of its parts, refits, a store that releases weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from rap_env.components import Site
from rap_env.llm.architecture import DecoderLayer
from rap_env.mask import PruningMask

Refit = tuple[torch.Tensor, torch.Tensor | None]  # the kept part of an output matrix [H, K], and its bias [H]


class Refits(Protocol):
    """Output matrices that make up for the parts that a site dropped."""

    digest: str  # what they were made from

    def of(self, site: Site) -> Refit:
        """That of a site with some of its parts, and its bias."""


class Residency(Protocol):
    """What knows which weights are in memory."""

    resident: PruningMask

    def check(self, mask: PruningMask) -> None:
        """Refuses a mask that keeps others."""

    def check_site(self, site: Site) -> None:
        """Refuses a site that has others."""

    def narrowed(self, layer: DecoderLayer, site: Site, refit: Refit | None) -> DecoderLayer:
        """The layer with a site's parts, whose weights are in memory."""

    def close(self) -> None:
        """Has all of them in memory."""


@dataclass(frozen=True)
class Preparation:
    """What the order of a model's parts rests on.

    Attributes:
        order: What the order is, as a short digest; empty for the checkpoint's own. Components' names end with it, so
            that a mask over parts in another order is refused.
        tokens: Calibration tokens that were forwarded for it.
        seconds: Time that this took when it was measured.
        scores: For each rule of scoring, the scores of the components by name.
    """

    order: str = ""
    tokens: int = 0
    seconds: float = 0.0
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
