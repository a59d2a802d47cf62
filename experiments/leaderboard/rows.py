"""Rows of a leaderboard, made from the records of runs.

A row is a record itself, one agent under one token budget. Its `config` holds what model, widths, evaluation and
contexts are built from, its `provenance` is that of the first seed, and its `results` are

    agent, token_budget, tuned_on, tuning_tokens    tokens that were forwarded to choose the agent's settings, on what
    report_windows                                  SHA-256 of the windows that losses are measured on
    seeds, tokens, dense_loss                       of each seed: tokens that were spent, the unpruned model's loss
    contexts                                        of each seed a list: batch_size, prompt_tokens, generated_tokens,
                                                    budget_bytes, budget_ratio, loss, and the mask: `widths` of the
                                                    sites, or where it keeps other parts than the first, `dropped`

Losses are in nats for each token of the report text.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rap_env.errors import InvalidConfig, InvalidMask, UnknownName
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload

_KEPT = ("agent", "model", "widths", "calibration", "evaluation", "reward", "workload")  # of a run's config
_OF_SEARCHES = ("seed", "search_windows", "fitness")  # of an evaluation; the report does not depend on them
OF_ORDERS = ("corpus", "sampling", "seed")  # of a calibration; the rest is what an agent reads, and pays for
_WORKLOAD = ("batch_size", "prompt_tokens", "generated_tokens")
_FAMILY = "family_contexts"


@dataclass(frozen=True)
class Tuning:
    """What an agent's settings were chosen on, and the tokens that this took, which no token budget counts."""

    on: str
    tokens: int

    def __post_init__(self) -> None:
        if not self.on.strip() or self.tokens < 0:
            raise InvalidConfig(
                f"expected what the agent was tuned on, 'nothing' if so, and tokens of at least 0; got {self.on!r} and"
                f" {self.tokens}"
            )


def records_of(records: Sequence[dict[str, Any]], agent: str) -> list[dict[str, Any]]:
    """An agent's records, in the order of token budget and seed.

    Raises:
        UnknownName: There is none.
        InvalidConfig: They are not of a context family, not of one clean commit, or differ in more than seed and token
            budget.
    """
    names = {record["results"].get("agent", "none") for record in records}
    if agent not in names:
        raise UnknownName("agent in the records", agent, names)
    chosen = [record for record in records if record["results"]["agent"] == agent]
    chosen.sort(key=lambda record: (_token_budget(record), record["results"]["seed"]))
    states = {json.dumps(record["provenance"].get("git"), sort_keys=True) for record in chosen}
    if len(states) > 1 or (json.loads(*states) or {"dirty": True})["dirty"]:
        raise InvalidConfig(
            f"expected records of one commit without changes, which others can run; got {', '.join(sorted(states))}"
        )
    if any(_report_of(record).rpartition(".")[2] != _FAMILY for record in chosen):
        raise InvalidConfig(
            "expected records of a context family, as experiment=family makes them; these report on"
            f" {' and '.join(sorted({_report_of(record) or 'nothing' for record in chosen}))}"
        )
    if any(row.get("kind") for record in chosen for row in record["results"]["rows"]):
        raise InvalidConfig("expected contexts of no kind of text, by which a leaderboard does not measure")
    twice = Counter((_token_budget(record), record["results"]["seed"]) for record in chosen)
    if found := [f"seed {seed} with {budget:,} tokens" for (budget, seed), count in twice.items() if count > 1]:
        raise InvalidConfig(f"expected one record for each seed and token budget; there are several of {found[0]}")
    first, *others = [
        {"agent": record["config"]["agent"], "model digest": record["provenance"]["model_digest"]}
        | family_of(record["config"], [_scenario(row) for row in record["results"]["rows"]])
        for record in chosen
    ]
    for other in others:
        if differing := sorted(key for key in first if first[key] != other[key]):
            raise InvalidConfig(f"expected records that differ in seed and token budget; their {differing[0]} differs")
    return chosen


def entries(records: Sequence[dict[str, Any]], shape, report_windows: str, tuning: Tuning) -> list[dict[str, Any]]:
    """A row for each token budget of an agent's records; where a larger one changed nothing, none.

    Args:
        records: What `records_of` returned.
        shape: The model that the masks are over.
        report_windows: Digest of the windows that they were reported on.
        tuning: What was done before.

    Raises:
        UnknownName: A mask drops what the model does not have.
    """
    budgets: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        budgets.setdefault(_token_budget(record), []).append(record)
    rows, told = [], []
    for budget, of_budget in budgets.items():
        results = {
            "agent": of_budget[0]["results"]["agent"],
            "tuned_on": tuning.on,
            "tuning_tokens": tuning.tokens,
            "report_windows": report_windows,
            "seeds": [record["results"]["seed"] for record in of_budget],
            "tokens": [record["results"]["search"]["tokens"] for record in of_budget],
            "dense_loss": [-record["results"]["dense"][_main(record)] for record in of_budget],
            "contexts": [[_context(row, _main(record), shape) for row in _rows(record)] for record in of_budget],
        }
        if results in told:
            continue
        told.append(results)
        config = {key: _without_folders(of_budget[0]["config"][key]) for key in _KEPT}
        provenance = of_budget[0]["provenance"]
        rows.append({"config": config, "provenance": provenance, "results": {**results, "token_budget": budget}})
    return rows


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuses rows that do not stand beside each other.

    Raises:
        InvalidConfig: There is none, one is no row, two are of one agent and token budget, or they are of different
            families or texts.
    """
    if not rows:
        raise InvalidConfig("expected a leaderboard with at least one row; got none")
    for row in rows:
        _check_row(row)
    names = Counter(name_of(row) for row in rows)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InvalidConfig(f"expected one row for each agent and token budget; there are several of {twice[0]}")
    first, *others = [
        family_of(row["config"], scenarios_of(row)) | {"report text": row["results"]["report_windows"]} for row in rows
    ]
    for row, other in zip(rows[1:], others, strict=True):
        if differing := sorted(key for key in first if first[key] != other[key]):
            raise InvalidConfig(
                f"expected rows of one context family; {name_of(row)} differs from {name_of(rows[0])} in"
                f" {', '.join(differing)}"
            )


def _check_row(row: Mapping[str, Any]) -> None:
    results = row["results"]
    keys = ("agent", "token_budget", "tuned_on", "tuning_tokens", "report_windows")
    of_seeds = ("seeds", "tokens", "dense_loss", "contexts")
    if missing := [key for key in (*keys, *of_seeds) if key not in results]:
        raise InvalidConfig(f"expected a row of a leaderboard; it lacks {', '.join(missing)}")
    if len({len(results[key]) for key in of_seeds}) != 1 or not results["seeds"]:
        raise InvalidConfig(f"{name_of(row)}: expected {', '.join(of_seeds)} of the same seeds, at least one")
    if len({tuple(map(_scenario, contexts)) for contexts in results["contexts"]}) != 1:
        raise InvalidConfig(f"{name_of(row)}: expected the same contexts for all seeds")


def family_of(config: Mapping[str, Any], scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """What is the same in all rows of a leaderboard: the model with its parts in order, the contexts, the report."""
    return {
        "model": config["model"],
        "widths": config["widths"],
        "order of parts": _without_folders({key: config["calibration"].get(key) for key in OF_ORDERS}),
        "evaluation": _without_searches(_without_folders(config["evaluation"])),
        "family": config["workload"]["sampler"],
        "contexts": list(scenarios),
    }


def name_of(row: Mapping[str, Any]) -> str:
    """A row as messages call it."""
    return f"{row['results']['agent']} ({row['results']['token_budget']:,} tokens)"


def scenarios_of(row: Mapping[str, Any]) -> list[Scenario]:
    """The contexts that a row reports on."""
    return [_scenario(context) for context in row["results"]["contexts"][0]]


def mask_of(context: Mapping[str, Any], shape) -> PruningMask:
    """The mask that stands in a context.

    Raises:
        InvalidMask, UnknownName: It is not one over the model's components.
    """
    if "widths" in context:
        return PruningMask.from_widths(shape, context["widths"])
    return PruningMask.all_kept(shape).drop(*context["dropped"])


def _context(row: Mapping[str, Any], evaluator: str, shape) -> dict[str, Any]:
    kept = {key: row[key] for key in (*_WORKLOAD, "budget_bytes", "budget_ratio")}
    mask = PruningMask.all_kept(shape).drop(*row["dropped"])
    try:
        chosen: dict[str, Any] = {"widths": list(mask.widths)}
    except InvalidMask:
        chosen = {"dropped": row["dropped"]}
    return kept | chosen | {"loss": -row["reports"][evaluator]["score"]}


def _scenario(row: Mapping[str, Any]) -> Scenario:
    return Scenario(Workload(*(row[key] for key in _WORKLOAD)), row["budget_bytes"])


def _rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return record["results"]["rows"]


def _main(record: Mapping[str, Any]) -> str:
    return record["results"]["evaluators"][0]


def _token_budget(record: Mapping[str, Any]) -> int:
    return record["results"]["search"]["token_budget"]


def _report_of(record: Mapping[str, Any]) -> str:
    return record["config"].get("workload", {}).get("report", {}).get("_target_", "")


def _without_searches(node: Any) -> Any:
    """A config of an evaluation, or of one with parts, without what its report does not depend on."""
    if isinstance(node, Mapping):
        return {key: _without_searches(value) for key, value in node.items() if key not in _OF_SEARCHES}
    return node


def _without_folders(node: Any) -> Any:
    """A config in which paths are names of files: each reader has them in another folder."""
    if isinstance(node, Mapping):
        return {
            key: [PurePath(path).name for path in value]
            if key.endswith("paths") and isinstance(value, list)
            else _without_folders(value)
            for key, value in node.items()
        }
    return node
