"""Agents that search nothing: they rank components by what calibration text says, or not even that."""

import itertools
import operator
from collections.abc import Sequence

from agents.base import Agent, Task
from agents.granularity import by_layer
from rap_env.errors import SearchExhausted, check_known
from rap_env.importance.block_influence import block_influence
from rap_env.importance.gsi import ImportanceRanking
from rap_env.importance.single_drops import single_drop_increases
from rap_env.mask import PruningMask
from rap_env.policies import DensePolicy, NearestOrderPolicy, OrderPolicy, PricedPolicy, RandomPolicy


class DenseAgent(Agent):
    """Never drops anything."""

    def policy(self) -> DensePolicy:
        return DensePolicy(self.task.problem.shape)


class RandomAgent(Agent):
    """Drops components in random order until the model fits."""

    def policy(self) -> RandomPolicy:
        return RandomPolicy(self.task.problem.shape, self.task.seed)


class OrderAgent(Agent):
    """Measures one order of the components when it begins, and walks it until the model fits."""

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._order = self.rank()

    def rank(self) -> Sequence[str]:
        """All component names, the first to go first."""
        raise NotImplementedError

    def policy(self) -> OrderPolicy:
        return OrderPolicy(self.task.problem.shape, self._order)


class GreedyGsiAgent(OrderAgent):
    """Greedy sequential importance without learning: RAP's order (arXiv 2505.17138)."""

    def rank(self) -> Sequence[str]:
        return self.task.ranking.order


class PricedGsiAgent(Agent):
    """What the removals of greedy sequential importance cost, priced anew for what they free at each workload.

    Where sites have parts these costs were measured on the model that was left; an order by weight bytes alone would
    not know what a KV head frees at a long workload.
    """

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._costs = task.ranking.costs

    def policy(self) -> PricedPolicy:
        return PricedPolicy(self.task.problem.shape, self._costs)


class OneShotAgent(OrderAgent):
    """GSI's first round and no other: what re-measuring on the shrunk model gains shows in the difference."""

    def rank(self) -> Sequence[str]:
        increases = self.details["increases"] = single_drop_increases(self.task.calibration)
        return sorted(increases, key=increases.__getitem__)


class ShortGptAgent(OrderAgent):
    """Drops first what turns the residual stream least (ShortGPT, arXiv 2403.03853).

    All components of a layer follow each other in the order. The walk along it ends, and refills, by components as for
    every order, so that the last layer may go by half: better for ShortGPT than whole layers would be.

    Args:
        granularity: `"layer"` as in the paper, or `"block"` for attentions and MLPs apart.

    Raises:
        UnknownName: No such granularity.
    """

    def __init__(self, granularity: str) -> None:
        self._granularity = check_known("granularity", granularity, ("layer", "block"))

    def rank(self) -> Sequence[str]:
        shape = self.task.problem.shape
        part_of = operator.attrgetter("layer" if self._granularity == "layer" else "name")
        parts = [list(part) for _, part in itertools.groupby(shape.sites, key=part_of)]
        influences = self.details["block_influence"] = block_influence(self.task.calibration, parts)
        ranked = [site for _, part in sorted(zip(influences, parts, strict=True)) for site in part]
        return [component.name for site in ranked for component in shape.components if component.site == site]


class GreedyLayersAgent(OrderAgent):
    """SLEB (arXiv 2402.09025): each round drops the layer whose absence gives the lowest calibration loss.

    l (l + 1) / 2 evaluations for l layers. What is left when the token budget does not pay for another round follows in
    the order of the last one's losses.
    """

    def rank(self) -> Sequence[str]:
        mask = PruningMask.all_kept(self.task.problem.shape)
        left, order, losses = by_layer(mask.components), [], []
        while left:
            without = [mask.drop(*layer) for layer in left]
            try:
                evaluated = self.task.calibration.evaluate(without, near=mask)
            except SearchExhausted:
                if not order:
                    raise
                break
            tried = sorted(
                zip((-one.score for one in evaluated), without, left, strict=True), key=operator.itemgetter(0)
            )
            (loss, mask, layer), *others = tried
            left = [layer for _loss, _mask, layer in others]
            order += layer
            losses.append(loss)
        self.details["losses"] = losses
        return [component.name for component in itertools.chain(order, *left)]


class GreedyPerByteAgent(Agent):
    """Greedy sequential importance for each byte that is freed: an order for each search scenario's workload.

    Bytes depend on a workload through the tokens in its KV cache alone, so workloads of equally many share an order.
    What an earlier order evaluated is not paid for again. Other workloads get the nearest order, and so do those that
    the token budget does not pay for any more.
    """

    def begin(self, task: Task) -> None:
        super().begin(task)
        window = task.problem.shape.attention_window
        workloads = {scenario.workload.cached_tokens(window): scenario.workload for scenario in task.scenarios}
        rankings: dict[int, ImportanceRanking] = {}
        for tokens, workload in workloads.items():
            try:
                rankings[tokens] = task.rank(workload)
            except SearchExhausted:
                if not rankings:
                    raise
                break
        self._orders = {tokens: ranking.order for tokens, ranking in rankings.items()}
        self.details["losses"] = {str(tokens): list(ranking.losses) for tokens, ranking in rankings.items()}

    def policy(self) -> NearestOrderPolicy:
        return NearestOrderPolicy(self.task.problem.shape, self._orders)
