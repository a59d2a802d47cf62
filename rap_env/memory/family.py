"""A family of contexts: scenarios that fill the ranges of a sampler evenly, to search on, to hold out, and beyond them."""

from collections.abc import Iterable, Iterator

from scipy.stats import qmc

from rap_env.errors import InfeasibleBudget, InvalidConfig, InvalidWorkload
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario, ScenarioSampler

_MOST_DRAWN = 13  # log2 of the points that are looked at for contexts


def searched_contexts(shape, sampler: ScenarioSampler, n: int, seed: int = 0) -> list[Scenario]:
    """The first contexts of the family: those that searches know.

    They lie on a scrambled Sobol sequence over the logarithms of batch size and prompt length and the budget ratio. A
    point that no mask can serve, or whose context was there already, is passed over for the next one.

    Args:
        shape: The model.
        sampler: Its ranges are the family's.
        n: How many.
        seed: Scrambles the sequence.

    Raises:
        InvalidConfig: None is asked for, or the ranges do not hold as many different ones.
    """
    return _take(_sequence(shape, sampler, seed), n)


def reported_contexts(  # noqa: PLR0913 - its arguments are the keys of a YAML
    shape,
    sampler: ScenarioSampler,
    n_searched: int,
    n_held_out: int,
    wider: ScenarioSampler,
    n_outside: int = 0,
    seed: int = 0,
) -> list[Scenario]:
    """The next contexts of the family, which no search knows, and after them some beyond its ranges.

    Args:
        shape: The model.
        sampler: As for `searched_contexts`.
        n_searched: Contexts of the sequence that are searched on.
        n_held_out: How many follow.
        wider: Contexts of its ranges that the sampler's do not cover are outside.
        n_outside: How many of them.
        seed: As for `searched_contexts`.

    Raises:
        InvalidConfig: No held-out context is asked for, or there are not as many different ones.
    """
    within = _take(_sequence(shape, sampler, seed), n_searched + n_held_out)
    if n_held_out < 1:
        raise InvalidConfig(f"expected at least one held-out context; got {n_held_out}")
    outside = (
        scenario
        for scenario in _sequence(shape, wider, seed)
        if not sampler.covers(
            scenario.workload.batch_size,
            scenario.workload.prompt_tokens,
            scenario.budget_bytes / dense_bytes(shape, scenario.workload),
        )
    )
    return within[n_searched:] + (_take(outside, n_outside) if n_outside else [])


def _sequence(shape, sampler: ScenarioSampler, seed: int) -> Iterator[Scenario]:
    """Every context that a mask can serve, each once, in the order of the sequence."""
    seen = set()
    for point in qmc.Sobol(3, rng=seed).random_base2(_MOST_DRAWN):
        try:
            scenario = sampler.at(shape, point.tolist())
        except (InfeasibleBudget, InvalidWorkload):
            continue
        if scenario not in seen:
            seen.add(scenario)
            yield scenario


def _take(contexts: Iterable[Scenario], n: int) -> list[Scenario]:
    if n < 1:
        raise InvalidConfig(f"expected at least one context; got {n}")
    taken = [scenario for _place, scenario in zip(range(n), contexts, strict=False)]
    if len(taken) < n:
        raise InvalidConfig(f"expected ranges with {n} contexts that a mask can serve; found {len(taken)}")
    return taken
