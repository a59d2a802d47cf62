"""The tables that records become, and the lines that stand under them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report.amortisation import family_table
from experiments.report.comparison import SEARCH, Comparison, decided, distinct, has_loss
from experiments.report.frontier import frontier_table
from experiments.report.kinds import family_kinds_table
from experiments.report.leaderboard import leaderboard_table
from experiments.report.metrics import SPREAD, interquartile_mean, loss_over_dense, plain_mean, regret, with_spread
from experiments.report.pairs import family_pairs_table, further_reports_table
from experiments.report.rewards import carry_over_rewards_table
from experiments.report.table import Table, number
from experiments.report.widths import compensation_table
from rap_env.errors import UnknownName

GB = 1e9
_SPENT_PARTS = (8, 4, 2, 1)  # of the token budget

Named = Mapping[str, Sequence[dict[str, Any]]]  # records by the name of their comparison


def table_lines(kind: str, named: Named) -> list[str]:
    """Markdown lines of a table with the notes under it.

    Args:
        kind: `metrics`, `spending`, `run`, `compensation`, `frontier`, `family`, `leaderboard`: of all records
            together; `compact`, `perplexity`: each name's records are a comparison of its own.
        named: Records by name.

    Raises:
        UnknownName: There is no such kind.
        ValueError: The records do not belong together.
    """
    if kind not in KINDS:
        raise UnknownName("kind of table", kind, KINDS)
    table = KINDS[kind](named)
    brackets = [f"In brackets {SPREAD}."] if any("[" in cell for cells in table.rows for cell in cells) else []
    under = [line for note in (*brackets, *notes(_all(named))) for line in ("", note)]
    return table.markdown + under


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
            *(number(*with_spread(cost(comparison, agent, name), statistic)) for cost, name, statistic, _ in costs),
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
        agent: [comparison.dense[SEARCH] - comparison.best_after(agent, step) for step in steps]
        for agent in comparison.agents
    }
    ordered = sorted((agent for agent in losses if np.isfinite(losses[agent][-1])), key=lambda agent: losses[agent][-1])
    rows = [[agent, *(f"{loss:.3f}" if np.isfinite(loss) else "-" for loss in losses[agent])] for agent in ordered]
    return Table(["agent", *map(str, steps)], rows)


def compact_table(named: Named) -> Table:
    """Mean loss over dense on both halves, for agents of one or several comparisons."""
    rows = []
    for name, records in named.items():
        comparison = Comparison(records)
        halves = (SEARCH, comparison.evaluators[0])
        losses = {agent: [loss_over_dense(comparison, agent, half) for half in halves] for agent in comparison.agents}
        for agent, of_halves in sorted(losses.items(), key=lambda item: plain_mean(item[1][0])):
            cells = [number(*with_spread(of_half, plain_mean)) for of_half in of_halves]
            tokens = f"{comparison.mean_search(agent, 'tokens'):.0f}"
            rows.append([name, agent, comparison.seeds(agent), *cells, tokens])
    columns = ["comparison", "agent", "seeds", "mean loss over dense, search half", "report half", "tokens"]
    return Table(columns, rows) if len(named) > 1 else Table(columns[1:], [row[1:] for row in rows])


def perplexity_table(named: Named) -> Table:
    """Perplexity of each seed on the main evaluator, for comparisons whose searches had different evaluators."""
    rows = set()
    for comparison in map(Comparison, named.values()):
        main = comparison.evaluators[0]
        if not comparison.is_text[main]:
            raise ValueError(f"expected an evaluator by text for a table of perplexities; got {main!r}")
        for agent in comparison.agents:
            seeds = np.exp(-comparison.scores(agent, main).mean(axis=1))
            cells = (", ".join(f"{seed:.1f}" for seed in seeds), f"{seeds.mean():.1f}")
            rows.add((seeds.mean(), agent, _searched_by(comparison.runs(agent)[0]), *cells))
    columns = ["agent", "searched by", "perplexity of each seed", "mean"]
    return Table(columns, [list(cells) for _mean, *cells in sorted(rows)])


def run_table(*records: Mapping[str, Any]) -> Table:
    """The closing table: a run's policy and those that need no search, means over the main evaluator's scenarios.

    Args:
        records: A run's, or those of several agents and seeds.
    """
    first = records[0]["results"]
    main = first["evaluators"][0]
    scores = {"minus the loss" if has_loss(first["rows"][0]["reports"][main]) else "accuracy": "score"}
    if all("smooth_accuracy" in row["reports"][main]["reward_terms"] for row in first["rows"]):
        scores["smooth accuracy"] = "smooth_accuracy"
    policies: dict[str, list[list[dict[str, Any]]]] = {}
    for record in records:
        policies.setdefault(record["results"]["agent"], []).append(record["results"]["rows"])
    agents = set(policies)
    for record in records:
        for name in sorted(record["results"]["references"].keys() - agents):
            policies.setdefault(name, []).append(record["results"]["references"][name])
    if all(row["reports"][main]["reward"] is not None for row in first["rows"]):
        scores["reward"] = "reward"
    columns = ["policy", "seeds", "budget GB", "footprint GB", *scores, "violations"]
    rows = [_run_cells(name, policies[name], main, list(scores.values())) for name in policies]
    return Table(columns, rows) if len(records) > 1 else Table(columns[:1] + columns[2:], [r[:1] + r[2:] for r in rows])


def _run_cells(name: str, of_seeds: list[list[dict[str, Any]]], main: str, keys: Sequence[str]) -> list[str]:
    of_seeds, seeds = distinct(of_seeds, decided)
    rows = [row for of_seed in of_seeds for row in of_seed]

    def value(row: Mapping[str, Any], key: str) -> float:
        report = row["reports"][main]
        return report[key] if key in report else report["reward_terms"][key]

    values = [np.array([[value(row, key) for row in of_seed] for of_seed in of_seeds]) for key in keys]
    n_bytes = [[row["budget_bytes"], row["footprint"]["peak_bytes"]] for row in rows]
    return [
        name,
        seeds,
        *(f"{mean / GB:.3f}" for mean in np.mean(n_bytes, axis=0)),
        *(number(*with_spread(of_key, plain_mean)) for of_key in values),
        f"{sum(row['violation'] for row in rows)} of {len(rows)}",
    ]


def notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where records come from that are not all of one commit, one clean checkout and one kind of machine."""
    commits = Counter(_commit(record["provenance"].get("git")) for record in records)
    machines = {  # of equal arithmetic count as one
        json.dumps(record["provenance"].get("numeric_platform"), sort_keys=True): _machine(record["provenance"])
        for record in records
    }
    found = []
    if len(commits) > 1 or any(" " in commit for commit in commits):
        counted = (f"{commit} ({count})" for commit, count in sorted(commits.items()))
        found.append(f"The records are of these commits: {', '.join(counted)}.")
    if len(machines) > 1:
        names = ", ".join(sorted(machines.values()))
        found.append(f"The records are of {len(machines)} machines, whose scores may differ slightly: {names}.")
    return found


def loss_name(comparison: Comparison, evaluator: str) -> str:
    return "log-perplexity over dense" if comparison.is_text[evaluator] else "accuracy below dense"


def _searched_by(run: Mapping[str, Any]) -> str:
    if not run["search"]["evaluations"]:
        return ""
    metrics = set().union(*run["rows"][0]["search"]["tasks"].values())
    return next((name for name in ("divergence", "loss") if name in metrics), "accuracy")


def _commit(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return "no known commit"
    return git["commit"][:7] + " with uncommitted changes" * git["dirty"]


def _machine(provenance: Mapping[str, Any]) -> str:
    platform, hardware = provenance.get("numeric_platform") or {}, provenance.get("hardware") or {}
    return platform.get("name") or hardware.get("cpu") or "unknown processor"


def _all(named: Named) -> list[dict[str, Any]]:
    return [record for records in named.values() for record in records]


KINDS = {
    "metrics": lambda named: metrics_table(Comparison(_all(named))),
    "spending": lambda named: spending_table(Comparison(_all(named))),
    "run": lambda named: run_table(*Comparison(_all(named)).records),
    "compact": compact_table,
    "perplexity": perplexity_table,
    "compensation": lambda named: compensation_table(_all(named)),
    "frontier": lambda named: frontier_table(_all(named)),
    "family": lambda named: family_table(_all(named)),
    "family_pairs": lambda named: family_pairs_table(_all(named)),
    "family_kinds": lambda named: family_kinds_table(_all(named)),
    "further_reports": lambda named: further_reports_table(_all(named)),
    "carry_over_rewards": lambda named: carry_over_rewards_table(_all(named)),
    "leaderboard": lambda named: leaderboard_table(_all(named)),
}
