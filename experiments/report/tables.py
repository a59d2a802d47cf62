"""The tables that records become, and the lines that stand under them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report.comparison import SEARCH, Comparison, decided, distinct, has_loss
from experiments.report.metrics import interquartile_mean, loss_over_dense, plain_mean, regret, spread_name, with_spread

GB = 1e9
_SPENT_PARTS = (8, 4, 2, 1)  # of the token budget


class Table(NamedTuple):
    """Names of the columns, and cells."""

    columns: list[str]
    rows: list[list[str]]


def markdown(table: Table, notes: Sequence[str] = ()) -> list[str]:
    """Lines of a Markdown table with notes under it."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [line for note in notes for line in ("", note)]


def metrics_table(comparison: Comparison) -> Table:
    """What each agent reaches and takes; the one with the least loss on the main evaluator's report first."""
    main, *_ = evaluators = comparison.evaluators
    costs = [(loss_over_dense, name, interquartile_mean, f"IQM {loss_name(comparison, name)}") for name in evaluators]
    costs += [(regret, name, interquartile_mean, "IQM regret") for name in (SEARCH, *evaluators)]
    costs += [(loss_over_dense, main, plain_mean, f"mean {loss_name(comparison, main)}")]
    costs += [(regret, SEARCH, plain_mean, "mean regret")]
    columns = ["agent", "seeds", *(f"{title} ({name})" for _cost, name, _statistic, title in costs), "violations"]
    columns += ["held-out violations", f"tokens of {comparison.token_budget}", "search s", "s of this run", "ms"]

    def cells(agent: str) -> list[str]:
        runs = comparison.runs(agent)
        rows = [row for run in runs for row in run["rows"]]
        held_out = [sum(run["held_out"][key] for run in runs) for key in ("violations", "decisions")]
        return [
            agent,
            comparison.seeds(agent),
            *(_number(*with_spread(cost(comparison, agent, name), statistic)) for cost, name, statistic, _ in costs),
            f"{sum(row['violation'] for row in rows)} of {len(rows)}",
            f"{held_out[0]} of {held_out[1]}",
            f"{comparison.mean_search(agent, 'tokens'):.0f}",
            f"{comparison.mean_search(agent, 'measured_seconds'):.1f}",
            f"{comparison.mean_search(agent, 'seconds'):.1f}",
            f"{np.median([row['decision_milliseconds'] for row in rows]):.2f}",
        ]

    def order(agent: str) -> tuple[float, str]:
        return float(interquartile_mean(loss_over_dense(comparison, agent, main))), agent

    return Table(columns, [cells(agent) for agent in sorted(comparison.agents, key=order)])


def spending_table(comparison: Comparison) -> Table:
    """The search half's loss over dense after so many tokens, mean over scenarios and seeds."""
    steps = [comparison.token_budget // part for part in _SPENT_PARTS]
    losses = {
        agent: [comparison.dense_score(SEARCH) - comparison.best_after(agent, step) for step in steps]
        for agent in comparison.agents
    }
    ordered = sorted((agent for agent in losses if np.isfinite(losses[agent][-1])), key=lambda agent: losses[agent][-1])
    rows = [[agent, *(f"{loss:.3f}" if np.isfinite(loss) else "-" for loss in losses[agent])] for agent in ordered]
    return Table(["agent", *map(str, steps)], rows)


def compact_table(comparisons: Mapping[str, Comparison]) -> Table:
    """Mean loss over dense on both halves, for agents of one or several comparisons."""
    rows = []
    for name, comparison in comparisons.items():
        for agent in sorted(
            comparison.agents, key=lambda agent: plain_mean(loss_over_dense(comparison, agent, SEARCH))
        ):
            halves = (SEARCH, comparison.evaluators[0])
            losses = [_number(*with_spread(loss_over_dense(comparison, agent, half), plain_mean)) for half in halves]
            tokens = f"{comparison.mean_search(agent, 'tokens'):.0f}"
            rows.append([name, agent, comparison.seeds(agent), *losses, tokens])
    columns = ["comparison", "agent", "seeds", "mean loss over dense, search half", "report half", "tokens"]
    several = len(comparisons) > 1
    return Table(columns, rows) if several else Table(columns[1:], [row[1:] for row in rows])


def perplexity_table(comparisons: Mapping[str, Comparison]) -> Table:
    """Perplexity of each seed on the main evaluator, for comparisons whose searches had different evaluators."""
    found = {}
    for comparison in comparisons.values():
        main = comparison.evaluators[0]
        if not comparison.is_text(main):
            raise ValueError(f"expected an evaluator by text for a table of perplexities; got {main!r}")
        for agent in comparison.agents:
            found[agent, _searched_by(comparison.runs(agent)[0])] = np.exp(-comparison.scores(agent, main).mean(axis=1))
    ordered = sorted(found.items(), key=lambda item: (np.mean(item[1]), item[0]))
    return Table(
        ["agent", "searched by", "perplexity of each seed", "mean"],
        [[*names, ", ".join(f"{seed:.1f}" for seed in seeds), f"{np.mean(seeds):.1f}"] for names, seeds in ordered],
    )


def run_table(*records: Mapping[str, Any]) -> Table:
    """The closing table: a run's policy and those that need no search, means over the main evaluator's scenarios.

    Args:
        records: A run's, or those of several agents and seeds.
    """
    results = [record["results"] for record in records]
    main = results[0]["evaluators"][0]
    policies: dict[str, list[list[dict[str, Any]]]] = {}
    for run in results:
        policies.setdefault(run["agent"], []).append(run["rows"])
    agents = set(policies)
    for run in results:
        for name in run["references"].keys() - agents:
            policies.setdefault(name, []).append(run["references"][name])
    order = ("dense", "random", "greedy_gsi")
    names = [*sorted(agents), *(name for name in order if name in policies and name not in agents)]
    by_text = has_loss(results[0]["rows"][0]["reports"][main])
    scores = {"minus the loss": "score"} if by_text else {"accuracy": "score", "smooth accuracy": "smooth_accuracy"}
    columns = ["policy", "seeds", "budget GB", "footprint GB", *scores, "reward", "violations"]
    rows = [_run_cells(name, policies[name], main, [*scores.values(), "reward"]) for name in names]
    return Table(columns, rows) if len(records) > 1 else Table(columns[:1] + columns[2:], [r[:1] + r[2:] for r in rows])


def _run_cells(name: str, of_seeds: list[list[dict[str, Any]]], main: str, keys: Sequence[str]) -> list[str]:
    of_seeds, seeds = distinct(of_seeds, decided)
    rows = [row for of_seed in of_seeds for row in of_seed]

    def value(row: Mapping[str, Any], key: str) -> float:
        report = row["reports"][main]
        return report[key] if key in report else report["reward_terms"][key]

    means = [
        with_spread(np.array([[value(row, key) for row in of_seed] for of_seed in of_seeds]), plain_mean)
        for key in keys
    ]
    gigabytes = [np.mean([bytes_of(row) for row in rows]) / GB for bytes_of in (_budget_bytes, _peak_bytes)]
    violations = f"{sum(row['violation'] for row in rows)} of {len(rows)}"
    return [name, seeds, *(f"{number:.3f}" for number in gigabytes), *(_number(*mean) for mean in means), violations]


def _budget_bytes(row: Mapping[str, Any]) -> int:
    return row["budget_bytes"]


def _peak_bytes(row: Mapping[str, Any]) -> int:
    return row["footprint"]["peak_bytes"]


def notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of where a table's records come from: several commits, changed files, several machines."""
    commits = Counter(_commit(record["provenance"].get("git")) for record in records)
    machines = {_platform(record["provenance"]): _machine(record["provenance"]) for record in records}
    found = []
    if len(commits) > 1 or any(" " in commit for commit in commits):
        counted = (f"{commit} ({count})" for commit, count in sorted(commits.items()))
        found.append(f"The records are of these commits: {', '.join(counted)}.")
    if len(machines) > 1:
        names = ", ".join(sorted(machines.values()))
        found.append(f"The records are of {len(machines)} machines, whose scores may differ slightly: {names}.")
    return found


def comparison_notes(comparison: Comparison) -> list[str]:
    """Notes on a comparison's records, and what its brackets are."""
    spread = spread_name(comparison)
    return [f"In brackets {spread}."] * bool(spread) + notes(comparison.records)


def loss_name(comparison: Comparison, evaluator: str) -> str:
    return "log-perplexity over dense" if comparison.is_text(evaluator) else "accuracy below dense"


def _searched_by(run: Mapping[str, Any]) -> str:
    if not run["anytime"]:
        return ""
    metrics = set().union(*run["rows"][0]["search"]["tasks"].values())
    return next((name for name in ("divergence", "loss") if name in metrics), "accuracy")


def _commit(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return "no known commit"
    return git["commit"][:7] + " with uncommitted changes" * git["dirty"]


def _platform(provenance: Mapping[str, Any]) -> str:
    """What floating-point results depend on, as text."""
    return json.dumps(provenance.get("numeric_platform"), sort_keys=True)


def _machine(provenance: Mapping[str, Any]) -> str:
    platform, hardware = provenance.get("numeric_platform") or {}, provenance.get("hardware") or {}
    return platform.get("name") or hardware.get("cpu") or "unknown processor"


def _number(value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.3f}" if low == high else f"{value:.3f} [{low:.3f}, {high:.3f}]"
