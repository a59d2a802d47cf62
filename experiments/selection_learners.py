"""Whether learning pays in a reranker that prunes its candidates: `python -m experiments.selection_learners PATHS OUT`.

Queries are split into three parts. Learners train on the first and choose checkpoints and the price of compute on the
second; rules are tuned on both together; the third is reported.

The gate, written before any run: an algorithm wins for a K if, at the price that was chosen for the target agreement,
the 95% paired bootstrap interval of its compute minus that of a rule at equal agreement lies below 0 for every rule,
over at least 50 held-out queries and three seeds of training. Whatever comes out is reported as it is.
"""

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.selection_learners import ALGORITHMS, Learned, learn
from agents.selection_rivals import rivals
from experiments.progress import phase
from experiments.records import provenance, write_record
from experiments.report.selection_learners import selection_learners_table
from experiments.rerank_training.data import Split
from experiments.selection_matching import Outcomes, cheapest, frontier, matched_difference, outcomes
from experiments.selection_split import add_split_options, read_split
from rap_env.envs.selection import TOP_KS, SelectionEnv
from rap_env.errors import InvalidConfig
from rap_env.rerank.choosing import Choosing
from rap_env.rerank.margins import score_noise
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.selection import Decider

_FEWEST_QUERIES, _FEWEST_SEEDS = 50, 3  # of the gate


@dataclass(frozen=True)
class Plan:
    """What is trained and compared.

    Attributes:
        steps: Environment steps of each training, by algorithm.
        prices: Of compute, each of which is trained for: what reading everything costs, in shares of agreement.
        seeds: Of the trainings.
        target: The mean agreement that rules are tuned for and prices chosen for.
        top_ks: K.
    """

    steps: Mapping[str, int]
    prices: Sequence[float]
    seeds: Sequence[int]
    target: float = 0.992
    top_ks: Sequence[int] = TOP_KS


@dataclass(frozen=True)
class Parts:
    """Paths of the three parts of a split, in its words."""

    training: ScorePaths
    validation: ScorePaths
    report: ScorePaths


def parts_of(paths: ScorePaths, split: Split) -> Parts:
    """The paths of each part.

    Raises:
        InvalidConfig: A query is in two parts, by its name or with the very same scores under another one.
    """
    parts = Parts(*(paths.part(getattr(split, name)) for name in ("training", "validation", "report")))
    owners: dict[str | bytes, str] = {}
    for part, own in vars(parts).items():
        for name, scores in zip(own.queries, own.scores, strict=True):
            for key in (name, hashlib.sha256(scores.tobytes()).digest()):
                if owners.setdefault(key, part) != part:
                    raise InvalidConfig(f"query {name!r} of the {part} part is in the {owners[key]} part, too")
    return parts


def compare(parts: Parts, plan: Plan) -> dict[str, Any]:
    """Tunes, trains, and lets all decide on the same held-out queries.

    Returns:
        `rules` and `learned`: by name and K what was chosen, and what it came to (means of `agreement`, `executions`
        and `compute`); the rules with their `curve` over settings, the learners with `prices`, each compared with
        every rule at equal agreement. Beside them `wins` by the gate, and `seconds` of each part.

    Raises:
        InvalidConfig: There is nothing to train, or a part has no query with more than K candidates.
    """
    if min(len(plan.steps), len(plan.prices), len(plan.seeds), len(plan.top_ks)) < 1:
        raise InvalidConfig("expected at least one algorithm, price, seed and K")
    seconds, started = {}, time.perf_counter()
    rules, curves = _tuned_rules(parts, plan)
    seconds["tuning rules"] = time.perf_counter() - started
    learned = {}
    for algorithm, n_steps in plan.steps.items():
        started = time.perf_counter()
        deciders = {price: _trained(parts, plan, algorithm, n_steps, price) for price in plan.prices}
        learned[algorithm] = {str(k): _reported(parts, plan, deciders, k, curves[k]) for k in plan.top_ks}
        seconds[algorithm] = time.perf_counter() - started
    enough = len(plan.seeds) >= _FEWEST_SEEDS
    wins = {name: {k: enough and _wins(found) for k, found in of_k.items()} for name, of_k in learned.items()}
    return {"rules": rules, "learned": learned, "wins": wins, "seconds": seconds}


def _tuned_rules(parts: Parts, plan: Plan) -> tuple[dict[str, dict], dict[int, dict[str, Outcomes]]]:
    """What rules came to, and by K and name the held-out outcomes of those settings that were the best in tuning."""
    names = (*parts.training.queries, *parts.validation.queries)
    columns = ("scores", "tokens", "grades", "similarities")
    *joined, similarities = (getattr(parts.training, name) + getattr(parts.validation, name) for name in columns)
    tuning = ScorePaths(names, *joined, parts.training.provenance, similarities)
    families = rivals(parts.training.spreads(), score_noise(parts.training.scores), bool(similarities))
    rules: dict[str, dict] = {name: {} for name in families}
    curves: dict[int, dict[str, Outcomes]] = {k: {} for k in plan.top_ks}
    with phase("tuning rules") as progress:
        for done, (name, k) in enumerate([(name, k) for name in families for k in plan.top_ks]):
            progress(done, len(families) * len(plan.top_ks))
            settings = families[name]
            found = outcomes(tuning, [one.decider for one in settings], k)
            chosen, reaches = cheapest(found, plan.target)
            best = frontier(found.agreement.mean(axis=1), found.compute.mean(axis=1))
            curves[k][name] = outcomes(parts.report, [settings[place].decider for place in best], k)
            rules[name][str(k)] = {
                "settings": settings[chosen].values,
                "reaches_target": reaches,
                "tuning": found.part([chosen]).means(),
                "report": outcomes(parts.report, [settings[chosen].decider], k).means(),
                "curve": [
                    {"settings": settings[place].values, **curves[k][name].part([number]).means()}
                    for number, place in enumerate(best)
                ],
            }
    return rules, curves


def _trained(parts: Parts, plan: Plan, algorithm: str, n_steps: int, price: float) -> list[Decider]:
    """One decider for each seed."""
    spreads, weights = parts.training.spreads(), {"agreement": 1.0, "compute": -price}

    def make_env() -> SelectionEnv:
        return SelectionEnv(parts.training, plan.top_ks, spreads, weights)

    def validate(policy: Learned) -> float:
        means = [outcomes(parts.validation, [Choosing(policy.choose, spreads)], k).means() for k in plan.top_ks]
        return float(np.mean([mean["agreement"] - price * mean["compute"] for mean in means]))

    deciders: list[Decider] = []
    for seed in plan.seeds:
        with phase(f"{algorithm}, price {price}, seed {seed}") as progress:
            report = lambda done, progress=progress: progress(min(done, n_steps), n_steps)  # noqa: E731
            policy = learn(algorithm, make_env, n_steps, seed, validate, report)
        deciders.append(Choosing(policy.choose, spreads))
    return deciders


def _reported(
    parts: Parts, plan: Plan, deciders: Mapping[float, list[Decider]], top_k: int, curves: Mapping[str, Outcomes]
) -> dict[str, Any]:
    prices, means = {}, []
    for price, of_seeds in deciders.items():
        validated, held_out = (outcomes(part, of_seeds, top_k) for part in (parts.validation, parts.report))
        means.append(validated.means())
        prices[str(price)] = {
            "validation": means[-1],
            "report": held_out.means(),
            "of_seeds": {name: values.mean(axis=1) for name, values in vars(held_out).items()},
            "minus": {name: matched_difference(held_out, curve) for name, curve in curves.items()},
            "queries": held_out.agreement.shape[1],
        }
    of_prices = Outcomes(
        *(np.array([[mean[name]] for mean in means]) for name in ("agreement", "executions", "compute"))
    )
    chosen, reaches = cheapest(of_prices, plan.target)
    return {"price": list(deciders)[chosen], "reaches_target": reaches, "prices": prices}


def _wins(found: Mapping[str, Any]) -> bool:
    one = found["prices"][str(found["price"])]
    below = all(difference["high"] < 0.0 for difference in one["minus"].values())
    return found["reaches_target"] and one["queries"] >= _FEWEST_QUERIES and below


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, compares, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_split_options(parser)
    parser.add_argument("--validation-share", type=float, default=0.1334, help="of the queries")
    parser.add_argument("--top-ks", type=int, nargs="+", default=list(TOP_KS))
    parser.add_argument("--prices", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3], help="of reading everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    defaults = {"ppo": 300_000, "dqn": 100_000}
    for name in ALGORITHMS:
        help_text = "of each training; 0 leaves it out"
        parser.add_argument(f"--{name}-steps", type=int, default=defaults[name], help=help_text)
    options = parser.parse_args(arguments)
    paths, split, config = read_split(parser, options, options.validation_share)
    steps = {name: n for name in ALGORITHMS if (n := getattr(options, f"{name}_steps"))}
    plan = Plan(steps, options.prices, options.seeds, options.target, options.top_ks)
    origin = provenance()  # before the run, which may be long
    results = compare(parts_of(paths, split), plan)
    record = {"config": {**config, **vars(plan)}, "provenance": origin, "results": results}
    print("\n".join(selection_learners_table(record).markdown))
    write_record(options.record, record)


if __name__ == "__main__":
    main()
