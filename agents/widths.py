"""Agents that only rank, by what is known of sites and their parts: the order of dropping follows from a price each."""

from collections.abc import Sequence

import numpy as np

from agents.base import Agent, Task
from agents.orders import OrderAgent
from rap_env.components import ATTENTION, KINDS, Component, Site
from rap_env.errors import InvalidMask, check_known
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION
from rap_env.importance.site_curves import SiteCurves, measure_site_curves
from rap_env.mask import PruningMask
from rap_env.policies import KindsPolicy, MilpPolicy, Policy, PricedPolicy


class _PricesAgent(OrderAgent):
    """An order by a price for each component; sites that have no parts are sites of one part."""

    def rank(self) -> Sequence[str]:
        components = self.task.problem.shape.components
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


class UniformAgent(_PricesAgent):
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


class FlapAgent(_PricesAgent):
    """FLAP (arXiv 2312.11983): fluctuation scores, standardised within each site, and one order over all.

    A group of channels has the mean of their scores. The paper's order inside a site is that of the same score
    (`widths.score=flap`); where another one stands, a part is worth as much as what goes before it.
    """

    def prices(self, components: Sequence[Component]) -> dict[str, float]:
        prepared, prices = self.task.problem.llm.preparation.scores, {}
        if not prepared:
            raise InvalidMask("flap compares scores of parts: expected a model of the granularity 'group' in order")
        scores = prepared["flap"]
        for parts in self.of_sites(components):
            values = np.array([scores[part.name] / part.weight_bytes for part in parts])
            values = (values**2 if parts[0].site.kind == ATTENTION else values) / values.mean()
            standard = (values - values.mean()) / (values.std() or 1.0)
            nested = np.maximum.accumulate(standard[::-1])[::-1]
            prices |= dict(zip((part.name for part in parts), nested.tolist(), strict=True))
        return prices


class TwoSspAgent(_PricesAgent):
    """2SSP (arXiv 2501.17771): all MLPs equally narrow, and a few whole attentions, the more the sparser.

    At a sparsity s the paper drops round(L s^(P_mlp / P_attention / 1.5)) of L attentions, in the order of greedy
    removal on one sample, and what is missing from all MLPs. Here that is one order, from s = 0 to 1, and attentions
    are ranked on the dense model. The paper's order inside an MLP is that of `widths.score=2ssp`.

    Args:
        rounds: Attentions that are ranked by greedy removal on one calibration window; the others follow.
    """

    def __init__(self, rounds: int = 10) -> None:
        self._rounds = rounds

    def prices(self, components: Sequence[Component]) -> dict[str, float]:
        sites = self.of_sites(components)
        attentions, mlps = ([parts for parts in sites if parts[0].site.kind == kind] for kind in KINDS)
        of_attentions, of_mlps = (sum(row.weight_bytes for parts in of for row in parts) for of in (attentions, mlps))
        power = of_mlps / of_attentions / 1.5
        sparsity = np.linspace(0.0, 1.0, 4001)
        n_dropped = np.round(len(attentions) * sparsity**power)
        missing = sparsity * (of_attentions + of_mlps) - n_dropped * of_attentions / len(attentions)
        dropped_part = np.maximum.accumulate(missing / of_mlps)
        prices = {}
        for place, site in enumerate(self._greedy([parts[0].site for parts in attentions])):
            names = [row.name for row in components if row.site == site]
            prices |= dict.fromkeys(names, float(sparsity[np.searchsorted(n_dropped, place + 1)]))
        for parts in mlps:
            for index, part in enumerate(parts):
                place = np.searchsorted(dropped_part, 1.0 - (index + 1) / len(parts), side="right")
                prices[part.name] = float(sparsity[min(place, len(sparsity) - 1)])
        return prices

    def _greedy(self, left: list[Site]) -> list[Site]:
        problem, window = self.task.problem, self.task.windows[:1]
        meter = Meter(problem.llm, PerplexityEvaluator(window, CALIBRATION), problem.store, problem.budget)
        mask, order = PruningMask.all_kept(problem.shape), []
        for _ in range(min(self._rounds, len(left))):
            evaluated = meter.evaluate([mask.drop(site) for site in left], near=mask)
            order.append(left.pop(max(range(len(left)), key=lambda index: evaluated[index].score)))
            mask = mask.drop(order[-1])
        return [*order, *left]


class CurvesAgent(Agent):
    """A loss curve for each site, measured with all others whole; what a policy makes of them is the subclass's.

    Args:
        levels: Points of a curve, at most; sites of fewer parts have as many as these.
        measured_on: `"calibration"` windows, or the `"search"` half.

    Raises:
        UnknownName: There is nothing of this name to measure on.
    """

    def __init__(self, levels: int = 4, measured_on: str = "calibration") -> None:
        self._levels = levels
        self._measured_on = check_known("text to measure on", measured_on, ("calibration", "search"))

    def begin(self, task: Task) -> None:
        super().begin(task)
        meter = task.calibration if self._measured_on == "calibration" else task.problem.meter
        curves = measure_site_curves(meter, self._levels)
        self.details |= {"increases": curves.costs, "levels": curves.levels}
        kinds = task.sampler.kinds if self._measured_on == "search" else ()
        if kinds:
            known = {kind: {mask: task.problem.known(mask, kind).score for mask in curves.known} for kind in kinds}
            self.details["of_kinds"] = {kind: SiteCurves(known[kind], curves.levels).costs for kind in kinds}


class SingleSiteGreedyAgent(CurvesAgent):
    """Greedy by loss for each byte that is freed at the workload, along the curves' lower convex hulls.

    Where workloads tell their kind of text, along that kind's own curves, which the same evaluations have measured.
    """

    def policy(self) -> Policy:
        shape = self.task.problem.shape
        blind = PricedPolicy(shape, self.details["increases"])
        if not (of_kinds := self.details.get("of_kinds")):
            return blind
        return KindsPolicy(shape, {"": blind} | {kind: PricedPolicy(shape, costs) for kind, costs in of_kinds.items()})


class MilpAgent(CurvesAgent):
    """Solves for the cheapest widths that fit, as if the curves added up.

    Puzzle's block-wise scores with mixed-integer programming (arXiv 2411.19146). A site without parts has one point.
    """

    def policy(self) -> MilpPolicy:
        return MilpPolicy(self.task.problem.shape, self.details["increases"])
