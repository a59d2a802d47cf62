"""Good masks for one kind of context: each component's cost measured alone in it, then the cheapest ones dropped."""

from collections import defaultdict
from collections.abc import Mapping

from rap_env.components import ATTENTION, Site
from rap_env.evaluation.meter import Meter
from rap_env.importance.rounds import price
from rap_env.importance.single_drops import increases_of
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import bytes_by_name, dense_bytes, footprint
from rap_env.memory.workload import Workload

_SCORE = "wanda"


def head_costs(meter: Meter) -> dict[str, float]:
    """By how much the dense model's score falls without each KV head, by name."""
    dense = PruningMask.all_kept(meter.llm.shape)
    heads = [component for component in dense.components if component.site.kind == ATTENTION]
    return increases_of(meter, {head.name: dense.drop(head) for head in heads})


def half_costs(meter: Meter) -> dict[Site, float]:
    """By how much it falls without the last half of the channel groups of each MLP."""
    shape = meter.llm.shape
    return increases_of(meter, {site: _without_half(shape, site) for site in shape.sites if site.kind != ATTENTION})


def _without_half(shape: ModelShape, site: Site) -> PruningMask:
    parts = [component for component in shape.components if component.site == site]
    return PruningMask.all_kept(shape).drop(*parts[len(parts) // 2 :])


def part_costs(shape: ModelShape, halves: Mapping[Site, float], scores: Mapping[str, float]) -> dict[str, float]:
    """A cost for each channel group: its share, by its score, of what the last half of its MLP costs.

    Args:
        shape: The model.
        halves: What `half_costs` returned; a half without which the model is better costs nothing.
        scores: Of the components by name, those that their order in a site rests on.
    """
    costs = {}
    for site, cost in halves.items():
        names = [component.name for component in shape.components if component.site == site]
        of_half = sum(scores[name] for name in names[len(names) // 2 :])
        costs |= {name: max(cost, 0.0) * scores[name] / of_half for name in names}
    return costs


def without_cheapest_heads(shape: ModelShape, costs: Mapping[str, float], n_dropped: int) -> PruningMask:
    """Drops so many KV heads, those of the lowest costs."""
    return PruningMask.all_kept(shape).drop(*sorted(costs, key=costs.__getitem__)[:n_dropped])


def without_cheapest_bytes(
    shape: ModelShape, costs: Mapping[str, float], workload: Workload, budget_ratio: float
) -> PruningMask:
    """Drops what costs least for the bytes that it frees, until the mask fits; of an MLP the last groups first.

    Args:
        shape: The model.
        costs: Of all components.
        workload: What the bytes are counted for.
        budget_ratio: Of the dense model's bytes.
    """
    freed, budget_bytes = bytes_by_name(shape, workload), budget_ratio * dense_bytes(shape, workload)
    site_of = {component.name: component.site for component in shape.components}
    groups: dict[Site, list[str]] = defaultdict(list)
    for name, site in site_of.items():
        if site.kind != ATTENTION:
            groups[site].append(name)
    mask = PruningMask.all_kept(shape)
    for name in sorted(costs, key=lambda name: price(costs[name], freed[name])):
        if footprint(shape, mask, workload).peak_bytes <= budget_bytes:
            break
        site = site_of[name]
        mask = mask.drop(groups[site].pop() if site in groups else name)
    return mask


def scores_of(llm) -> Mapping[str, float]:
    """Those that the order of a prepared model's parts rests on."""
    return llm.preparation.scores[_SCORE]
