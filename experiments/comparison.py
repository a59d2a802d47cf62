"""The records of one comparison, read together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records import read_record

SEARCH = "search"  # the search half's name among the judges


def is_comparison(record: Mapping[str, Any]) -> bool:
    """Whether a record was written by `experiments.compare`."""
    return "anytime" in record["results"]


@dataclass(frozen=True)
class Comparison:
    """Records of agents and seeds that faced the same scenarios and judges.

    Arrays over the scenarios [seeds, scenarios] have them in the order of `scenarios`.

    Attributes:
        records: In the order of agent and seed, whatever order they were read in.

    Raises:
        ValueError: There is no record, two are of one agent and seed, or they are of different comparisons.
    """

    records: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, paths: Sequence[str | Path]) -> "Comparison":
        return cls.of([read_record(path) for path in paths])

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]]) -> "Comparison":
        if not records:
            raise ValueError("expected at least one record of a comparison; got none")
        names = Counter(f"{record['results']['agent']} {record['results']['seed']}" for record in records)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise ValueError(f"expected one record for each agent and seed; there are several of {', '.join(twice)}")
        first, *others = map(_shared, records)
        for other in others:
            if differing := sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)):
                raise ValueError(f"expected records of one comparison; their {', '.join(differing)} differ")
        by_agent = sorted(records, key=lambda record: (record["results"]["agent"], record["results"]["seed"]))
        return cls(tuple(by_agent))

    @property
    def agents(self) -> list[str]:
        return list(dict.fromkeys(record["results"]["agent"] for record in self.records))

    @property
    def components(self) -> list[str]:
        return self.records[0]["results"]["components"]

    @property
    def scenarios(self) -> list[tuple[str, float]]:
        """(workload as text, budget ratio) of each row."""
        return [(_workload_name(row), round(row["budget_ratio"], 4)) for row in self.records[0]["results"]["rows"]]

    @property
    def judges(self) -> list[str]:
        """Names of the reports' judges; the first is the main one."""
        return self.records[0]["results"]["judges"]

    def runs(self, agent: str) -> list[dict[str, Any]]:
        """Results of an agent's seeds."""
        return [record["results"] for record in self.records if record["results"]["agent"] == agent]

    def scores(self, agent: str, judge: str) -> np.ndarray:
        """An agent's scores [seeds, scenarios]; minus infinity where the mask does not fit."""
        return np.array([[_score(row, judge) for row in run["rows"]] for run in self.runs(agent)])

    def best_after(self, agent: str, evaluations: int) -> float:
        """Mean over the seeds, and the scenarios, of the best search score among so many masks asked about.

        Minus infinity where a scenario had no mask that fits by then.
        """
        curves = [run["anytime"] for run in self.runs(agent)]
        return float(np.mean([max([s for n, s in curve if n <= evaluations], default=-np.inf) for curve in curves]))

    def dense_score(self, judge: str) -> float:
        return self.records[0]["results"]["dense"][judge]

    def is_text(self, judge: str) -> bool:
        """Whether a judge's score is minus a loss instead of an accuracy."""
        row = self.records[0]["results"]["rows"][0]
        tasks = row["tasks"] if judge == SEARCH else row["reports"][judge]["tasks"]
        return any("perplexity" in metrics for metrics in tasks.values())


def _workload_name(row: Mapping[str, Any]) -> str:
    generated = f" + {row['generated_tokens']}" if row["generated_tokens"] else ""
    return f"{row['batch_size']} x {row['prompt_tokens']}{generated} tokens"


def _score(row: Mapping[str, Any], judge: str) -> float:
    if row["violation"]:
        return -np.inf
    return row["score"] if judge == SEARCH else row["reports"][judge]["score"]


def _shared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal in all records of a comparison."""
    results = record["results"]
    of_config = {key: value for key, value in record["config"].items() if key not in ("agent", "seed", "decisions")}
    model = {"model_digest": record["provenance"].get("model_digest")}
    scenarios = [[row["budget_bytes"], _workload_name(row)] for row in results["rows"]]
    return of_config | model | {"scenarios": scenarios, "judges": results["judges"]}
