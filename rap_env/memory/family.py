"""A family of contexts: scenarios that fill the ranges of a sampler evenly, and some that lie beyond them."""

from collections.abc import Iterable, Iterator

from scipy.stats import qmc

from rap_env.errors import InfeasibleBudget, InvalidConfig, InvalidWorkload
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario, ScenarioSampler

_MOST_DRAWN = 13  # log2 of the points that are looked at for contexts


def family_contexts(  # noqa: PLR0913 - its arguments are the keys of a YAML
    shape,
    sampler: ScenarioSampler,
    n: int,
    first: int = 0,
    wider: ScenarioSampler | None = None,
    n_outside: int = 0,
    seed: int = 0,
) -> list[Scenario]:
    """Contexts of a family, one after another, and after them some beyond its ranges.

    They lie on a scrambled Sobol sequence over the logarithms of batch size and prompt length, the budget ratio and the
    kind of text, if there are any. A point that no mask can serve, or whose context was there already, is passed over
    for the next one: so contexts are different, and those from the `n`-th on are held out from who knows the first `n`.

    Args:
        shape: The model.
        sampler: Its ranges are the family's.
        n: How many.
        first: How many come before them.
        wider: Contexts within its ranges that the sampler's do not cover are outside the family.
        n_outside: How many of them.
        seed: Scrambles the sequence.

    Raises:
        InvalidConfig: No context is asked for, the ranges do not hold as many different ones, or there are no wider
            ranges for those outside.
    """
    if n < 1 or first < 0 or (n_outside and wider is None):
        raise InvalidConfig(
            "expected at least one context, none or more before it, and wider ranges for those outside;"
            f" got {n}, {first} and {n_outside} within {wider}"
        )
    within = _take(_sequence(shape, sampler, seed), first + n)
    outside = (
        scenario
        for scenario in (_sequence(shape, wider, seed) if n_outside else ())
        if not sampler.covers(
            scenario.workload.batch_size,
            scenario.workload.prompt_tokens,
            scenario.budget_bytes / dense_bytes(shape, scenario.workload),
        )
    )
    return within[first:] + _take(outside, n_outside)


def _sequence(shape, sampler: ScenarioSampler, seed: int) -> Iterator[Scenario]:
    """Every context that a mask can serve, each once, in the order of the sequence."""
    seen = set()
    for point in qmc.Sobol(sampler.n_dimensions, rng=seed).random_base2(_MOST_DRAWN):
        try:
            scenario = sampler.at(shape, point.tolist())
        except (InfeasibleBudget, InvalidWorkload):
            continue
        if scenario not in seen:
            seen.add(scenario)
            yield scenario


def _take(contexts: Iterable[Scenario], n: int) -> list[Scenario]:
    taken = [scenario for _place, scenario in zip(range(n), contexts, strict=False)]
    if len(taken) < n:
        raise InvalidConfig(f"expected ranges with {n} contexts that a mask can serve; found {len(taken)}")
    return taken
