"""Agents that only rank, where sites have parts: how much each site keeps follows from scores of calibration text."""

from collections.abc import Sequence

import numpy as np

from agents.orders import OrderAgent
from rap_env.errors import InvalidMask
from rap_env.mask import ATTENTION, Component


class _ScoresAgent(OrderAgent):
    """An order that the statistics behind the model's order of parts tell; they are paid for as its preparation."""

    def rank(self) -> Sequence[str]:
        components = self.task.problem.shape.components
        if all(component.part is None for component in components):
            raise InvalidMask("expected a model of the granularity 'group'; whole sites have no parts to compare")
        prices = self.prices(components)
        return sorted((component.name for component in reversed(components)), key=prices.__getitem__)

    def prices(self, components: Sequence[Component]) -> dict[str, float]:
        """What says when each component goes, by name: the lowest first, of equals the last in model order."""
        raise NotImplementedError

    def of_sites(self, components: Sequence[Component]) -> list[list[Component]]:
        """The parts of each site in their order."""
        sites: dict[object, list[Component]] = {}
        for component in components:
            sites.setdefault(component.site, []).append(component)
        return list(sites.values())


class UniformAgent(_ScoresAgent):
    """The same part of every site: Wanda-sp (in FLAP's code, arXiv 2312.11983), where parts are ordered by `"wanda"`.

    Args:
        attentions: Whether KV heads go at all; else only MLP channels do while there are any.
    """

    def __init__(self, attentions: bool = True) -> None:
        self._attentions = attentions

    def prices(self, components: Sequence[Component]) -> dict[str, float]:
        prices = {}
        for parts in self.of_sites(components):
            late = 1.0 if parts[0].site.kind == ATTENTION and not self._attentions else 0.0
            prices |= {part.name: late - (index + 0.5) / len(parts) for index, part in enumerate(parts)}
        return prices


class FlapAgent(_ScoresAgent):
    """FLAP (arXiv 2312.11983): fluctuation scores, standardised within each site, and one order over all.

    A group of channels has the mean of their scores. The paper's order inside a site is that of the same score
    (`widths.score=flap`); where another one stands, a part is worth as much as what goes before it.
    """

    def prices(self, components: Sequence[Component]) -> dict[str, float]:
        scores, prices = self.task.problem.llm.preparation.scores["flap"], {}
        for parts in self.of_sites(components):
            values = np.array([scores[part.name] / part.weight_bytes for part in parts])
            values = (values**2 if parts[0].site.kind == ATTENTION else values) / values.mean()
            standard = (values - values.mean()) / (values.std() or 1.0)
            nested = np.maximum.accumulate(standard[::-1])[::-1]
            prices |= dict(zip((part.name for part in parts), nested.tolist(), strict=True))
        return prices
