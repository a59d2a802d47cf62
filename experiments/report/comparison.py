"""The records of one comparison, read together."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.records import dense_scores
from rap_env.memory.workload import Workload

SEARCH = "search"  # the search half's name among the evaluators
_RESULTS = ("agent", "seed", "components", "evaluators", "dense", "search", "anytime", "rows", "references", "held_out")
# of the configs of a comparison
_MAY_DIFFER = ("agent", "seed", "decisions", "tracker", "store", "workers", "in_flight")
_DIGESTS = ("model_digest", "tokenizer_digest", "corpus_digest")


class Comparison:
    """Records of agents and seeds that faced the same scenarios and evaluators.

    Arrays over the scenarios [seeds, scenarios] have them in the order of `scenarios`. Seeds whose records are equal
    count as one: the agent is deterministic.

    Args:
        records: In any order.

    Attributes:
        records: In the order of agent and seed.
        scenarios: (workload as text, budget ratio) of each row.
        evaluators: Names of the report's evaluators; the first is the main one.
        dense: The dense model's score on each evaluator and on the search half. Where each seed draws search text of
            its own, that is the first record's, and search scores are shifted as if the dense model had it on all.
        is_text: Whether a report evaluator's score is minus a loss instead of an accuracy.
        token_budget: Tokens that each search may forward.

    Raises:
        ValueError: There is no record, one is not a run's, two are of one agent and seed, or they are of different
            comparisons.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        _check(records)
        self.records = sorted(records, key=lambda record: (record["results"]["agent"], record["results"]["seed"]))
        first = self.records[0]["results"]
        self.components, self.evaluators, self.dense = first["components"], first["evaluators"], first["dense"]
        self.scenarios = [(workload_name(row), round(row["budget_ratio"], 4)) for row in first["rows"]]
        self.token_budget = first["search"]["token_budget"]
        self.is_text = {name: has_loss(first["rows"][0]["reports"][name]) for name in self.evaluators}
        runs: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            runs.setdefault(record["results"]["agent"], []).append(record["results"])
        self.agents = list(runs)
        self._runs = {agent: distinct(of_agent, _outcome) for agent, of_agent in runs.items()}

    def runs(self, agent: str) -> list[dict[str, Any]]:
        """Results of an agent's seeds."""
        return self._runs[agent][0]

    def seeds(self, agent: str) -> str:
        """The number of an agent's seeds as a table shows it."""
        return self._runs[agent][1]

    def scores(self, agent: str, evaluator: str) -> np.ndarray:
        """An agent's scores [seeds, scenarios]; minus infinity where the mask does not fit."""
        scores = np.array([[_score(row, evaluator) for row in run["rows"]] for run in self.runs(agent)])
        return scores + [[self.shift(run)] for run in self.runs(agent)] if evaluator == SEARCH else scores

    def dense_scores(self, evaluator: str) -> np.ndarray:
        """The dense model's scores [scenarios]."""
        return np.array(dense_scores(self.records[0]["results"], evaluator))

    def shift(self, run: Mapping[str, Any]) -> float:
        """What has to be added to the search scores of a run, so that they compare with those on other search text."""
        return self.dense[SEARCH] - run["dense"][SEARCH]

    def curves(self, agent: str) -> list[list[list[float]]]:
        """For each seed [tokens spent, mean of the best search scores so far].

        An agent that evaluates no mask has one point: its policy's masks after what else it spent, as a rule a ranking.
        """
        policies = self.scores(agent, SEARCH).mean(axis=1)
        runs = zip(self.runs(agent), policies, strict=True)
        return [
            [[tokens, score + self.shift(run)] for tokens, score in run["anytime"]]
            or [[run["search"]["tokens"], float(policy)]]
            for run, policy in runs
        ]

    def best_after(self, agent: str, tokens: float) -> float:
        """Mean over the seeds of the search score after so many tokens; minus infinity before there is one."""
        curves = self.curves(agent)
        return float(np.mean([max([s for n, s in curve if n <= tokens], default=-np.inf) for curve in curves]))

    def mean_search(self, agent: str, key: str) -> float:
        """Mean over the seeds of what a search took: `tokens`, `seconds`, `measured_seconds`."""
        return float(np.mean([run["search"][key] for run in self.runs(agent)]))


def _check(records: Sequence[dict[str, Any]]) -> None:
    if not records:
        raise ValueError("expected at least one record of a comparison; got none")
    for record in records:
        if missing := [key for key in _RESULTS if key not in record["results"]]:
            raise ValueError(f"expected the results of a run: {', '.join(_RESULTS)}; missing {', '.join(missing)}")
    names = Counter(f"{record['results']['agent']} {record['results']['seed']}" for record in records)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(f"expected one record for each agent and seed; there are several of {', '.join(twice)}")
    own_text = all(map(draws_own_text, records))
    first, *others = [_shared(record, own_text) for record in records]
    for other in others:
        if differing := sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)):
            raise ValueError(f"expected records of one comparison; their {', '.join(differing)} differ")


def draws_own_text(record: Mapping[str, Any]) -> bool:
    """Whether a run's search text is drawn by its own seed."""
    return record["results"]["seed"] in _seeds(record["config"].get("evaluation", {}))


def without_draws(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's config without the seeds that draw its text, and that of its parts."""
    return {
        key: without_draws(value) if isinstance(value, Mapping) else value
        for key, value in evaluation.items()
        if key != "seed"
    }


def _seeds(evaluation: Mapping[str, Any]) -> list[int]:
    of_parts = [seed for part in evaluation.values() if isinstance(part, Mapping) for seed in _seeds(part)]
    return [evaluation["seed"], *of_parts] if "seed" in evaluation else of_parts


def distinct(runs: list, outcome: Callable) -> tuple[list, str]:
    """An agent's runs and their number as a table shows it; seeds with equal outcomes are one run."""
    if len(runs) > 1 and all(outcome(run) == outcome(runs[0]) for run in runs[1:]):
        return runs[:1], "1 (deterministic)"
    return runs, str(len(runs))


def decided(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from one time to the next."""
    return [{key: value for key, value in row.items() if key != "decision_milliseconds"} for row in rows]


def has_loss(evaluated: Mapping[str, Any]) -> bool:
    """Whether a row's score on an evaluator is minus a mean loss."""
    return any("loss" in metrics for metrics in evaluated["tasks"].values())


def workload_name(row: Mapping[str, Any]) -> str:
    return str(Workload(row["batch_size"], row["prompt_tokens"], row["generated_tokens"], row.get("kind", "")))


def _outcome(run: Mapping[str, Any]) -> tuple:
    return decided(run["rows"]), run["anytime"], run["search"]["tokens"]


def _score(row: Mapping[str, Any], evaluator: str) -> float:
    if row["violation"]:
        return -np.inf
    return (row["search"] if evaluator == SEARCH else row["reports"][evaluator])["score"]


def _shared(record: Mapping[str, Any], own_text: bool) -> dict[str, Any]:
    """What must be equal in all records of a comparison.

    Args:
        record: One of them.
        own_text: Whether each seed draws search text of its own: they may differ in that, and not in the dense model's
            score on the reported one.
    """
    results = record["results"]
    of_config = {key: value for key, value in record["config"].items() if key not in _MAY_DIFFER}
    digests = {name: record["provenance"].get(name) for name in _DIGESTS}
    of_results = {key: results[key] for key in ("components", "evaluators")}
    if own_text:
        of_config["evaluation"] = without_draws(of_config["evaluation"])
        of_results["dense"] = {name: results["dense"][name] for name in results["evaluators"]}
    scenarios = [[row["budget_bytes"], workload_name(row)] for row in results["rows"]]
    return of_config | digests | of_results | {"scenarios": scenarios}
