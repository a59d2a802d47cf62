"""One context family under several token budgets: what held-out contexts lose, and what was spent for each of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from plotly.graph_objects import Figure

from experiments.leaderboard.rows import OF_ORDERS
from experiments.report.comparison import Comparison, draws_own_text, without_draws
from experiments.report.drawing import PageFigure, spread_line
from experiments.report.metrics import SPREAD, best_known, loss_over_dense, plain_mean, with_spread
from experiments.report.table import Table, number
from rap_env.memory.scenario import ScenarioSampler

_MAY_DIFFER = ("name", "token_budget")  # of the configs of one family, beside the contexts that are searched on


@dataclass(frozen=True)
class Entry:
    """What an agent reaches within a token budget; losses and regret with both ends of their spread.

    Attributes:
        agent: Its name; with what it searched on, where that were the reported contexts themselves.
        seeds: As a table shows them.
        evaluations: Evaluations that its tokens would pay for, mean over the seeds.
        for_each: The same for each held-out context.
        held_out: Mean loss over dense on contexts that lie within the family.
        outside: The same on those beyond its ranges; None where there are none.
        regret: Of held-out contexts, against the best mask of any agent under any budget.
        milliseconds: Median of one decision.
    """

    agent: str
    seeds: str
    evaluations: float
    for_each: float
    held_out: tuple[float, float, float]
    outside: tuple[float, float, float] | None
    regret: tuple[float, float, float]
    milliseconds: float


class Amortisation:
    """Records of one context family that differ in token budget, read together.

    Args:
        records: In any order; of each agent, seed and token budget one.

    Attributes:
        entries: Sorted by agent and what it spent. Who spends the same under several budgets stands there once.
        evaluator: Whose report is told: the main one.

    Raises:
        ValueError: The records do not belong together, or no reported context lies within the family.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        groups: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            groups.setdefault(_searched(record), []).append(record)
        comparisons = [Comparison(group) for _key, group in sorted(groups.items())]
        first = comparisons[0]
        if any(_shared(each) != _shared(first) for each in comparisons):
            raise ValueError(
                "expected records of one family; they differ in more than token budget and search contexts"
            )
        self.evaluator, self._within = first.evaluators[0], within_family(first.records[0])
        if not self._within.any():
            raise ValueError("expected a reported context within the ranges of the sampler; there is none")
        best = np.max([best_known(each, self.evaluator) for each in comparisons], axis=0)
        entries = {}
        for comparison in comparisons:
            for agent in comparison.agents:
                entry = self._entry(comparison, agent, best)
                entries.setdefault((entry.agent, round(entry.evaluations, 3), entry.held_out), entry)
        self.entries = [entries[key] for key in sorted(entries)]

    def _entry(self, comparison: Comparison, agent: str, best: np.ndarray) -> Entry:
        runs, losses = comparison.runs(agent), loss_over_dense(comparison, agent, self.evaluator)
        regret = best - comparison.scores(agent, self.evaluator)
        evaluations = comparison.mean_search(agent, "tokens") / runs[0]["search"]["tokens_each"]
        workload = comparison.records[0]["config"]["workload"]
        by_itself = workload["search"].get("first", 0) == workload["report"].get("first")
        outside = losses[:, ~self._within]
        return Entry(
            agent + " on each context" * by_itself,
            comparison.seeds(agent),
            evaluations,
            evaluations / int(self._within.sum()),
            tuple(float(end) for end in with_spread(losses[:, self._within], plain_mean)),
            tuple(float(end) for end in with_spread(outside, plain_mean)) if outside.size else None,
            tuple(float(end) for end in with_spread(regret[:, self._within], plain_mean)),
            float(np.median([row["decision_milliseconds"] for run in runs for row in run["rows"]])),
        )


def within_family(record: Mapping[str, Any]) -> np.ndarray:
    """Which of a record's reported contexts lie within the ranges of its sampler [scenarios]."""
    return within_ranges(record["config"]["workload"]["sampler"], record["results"]["rows"])


def within_ranges(sampler: Mapping[str, Any], contexts: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Which contexts lie within the ranges of a sampler's config [contexts]."""
    covers = ScenarioSampler(**{key: value for key, value in sampler.items() if key[0] != "_"}).covers
    keys = ("batch_size", "prompt_tokens", "budget_ratio")
    return np.array([covers(*(context[key] for key in keys)) for context in contexts])


def is_family(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether records say more together than one comparison does: several budgets, or contexts beyond the ranges."""
    if len({record["config"].get("token_budget") for record in records}) > 1:
        return all("workload" in record["config"] for record in records)
    within = within_family(records[0]) if records and "workload" in records[0]["config"] else np.array([])
    return bool(within.any() and not within.all())


def family_table(records: Sequence[dict[str, Any]]) -> Table:
    """Held-out contexts and those outside the family, by what was spent; the least loss first."""
    family = Amortisation(records)
    rows = [
        [
            entry.agent,
            entry.seeds,
            f"{entry.evaluations:.0f}",
            f"{entry.for_each:.1f}",
            number(*entry.held_out),
            number(*entry.regret),
            number(*entry.outside) if entry.outside else "-",
            f"{entry.milliseconds:.2f}",
        ]
        for entry in sorted(family.entries, key=lambda entry: (entry.held_out[0], entry.evaluations))
    ]
    columns = ["agent", "seeds", "evaluations' worth of tokens", "for each held-out context"]
    return Table([*columns, "held-out loss over dense", "held-out regret", "outside, loss over dense", "ms"], rows)


def amortisation_figure(records: Sequence[dict[str, Any]]) -> PageFigure:
    """Regret on held-out contexts against evaluations for each of them."""
    family, figure = Amortisation(records), Figure()
    for place, agent in enumerate(dict.fromkeys(entry.agent for entry in family.entries)):
        entries = [entry for entry in family.entries if entry.agent == agent]
        spreads = [entry.regret for entry in entries]
        figure.add_trace(spread_line(agent, place, [entry.for_each for entry in entries], spreads))
    figure.update_xaxes(title="evaluations for each held-out context, in tokens", type="log")
    figure.update_yaxes(title=f"regret on {family.evaluator}", rangemode="tozero")
    figure.update_layout(height=520, showlegend=True)
    caption = (
        "Amortisation: what a search spends is shared by the held-out contexts that its policy answers. Regret is the"
        f" best known score of a context minus the score reached, mean over held-out contexts and seeds, bars {SPREAD};"
        " best known is the best mask of any agent under any budget that fits. A line joins one agent's token budgets."
    )
    return PageFigure("amortisation", "Regret against evaluations for each context", caption, figure)


def _searched(record: Mapping[str, Any]) -> str:
    """What may differ between the records of a family and not within a comparison, as a sortable text."""
    config = record["config"]
    return json.dumps(
        [f"{config['token_budget']:020}", config.get("name"), config["workload"]["search"]], sort_keys=True
    )


def _shared(comparison: Comparison) -> dict[str, Any]:
    config = comparison.records[0]["config"]
    own = ("agent", "seed", "decisions", "tracker", "store", "workers", "in_flight", "workload", *_MAY_DIFFER)
    shared = {key: value for key, value in config.items() if key not in own}
    if draws_own_text(comparison.records[0]):
        shared["evaluation"] = without_draws(config["evaluation"])
    if "calibration" in config:
        shared["calibration"] = {key: config["calibration"].get(key) for key in OF_ORDERS}
    scenarios = [row["budget_bytes"] for row in comparison.records[0]["results"]["rows"]]
    family = {"sampler": config["workload"]["sampler"], "scenarios": comparison.scenarios, "bytes": scenarios}
    return shared | family | {"evaluators": comparison.evaluators}
