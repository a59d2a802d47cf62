"""Agents of a context family: seed by seed against the surrogate, and on everything that they are reported on."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.records import dense_scores
from experiments.report.amortisation import Amortisation, within_family
from experiments.report.comparison import Comparison
from experiments.report.metrics import loss_over_dense, plain_mean, with_spread
from experiments.report.table import Table, number

REFERENCE = "family_surrogate"


def family_pairs_table(records: Sequence[dict[str, Any]]) -> Table:
    """Held-out loss over dense of each agent against the reference's, for each token budget that both have.

    Differences are of equal seeds, mean over the held-out contexts, with their spread over the seeds. So what a seed's
    search text is worth stands on both sides.

    Args:
        records: Of one family.

    Raises:
        ValueError: The records do not belong together, or there is none of the reference.
    """
    Amortisation(records)  # refuses what does not belong together
    within, losses = within_family(records[0]), defaultdict(dict)
    for record in records:
        results, budget = record["results"], record["config"]["token_budget"]
        main = results["evaluators"][0]
        scores = np.array([row["reports"][main]["score"] for row in results["rows"]])[within]
        losses[budget, results["agent"]][results["seed"]] = np.array(dense_scores(results, main))[within] - scores
    if not any(agent == REFERENCE for _budget, agent in losses):
        raise ValueError(f"expected records of {REFERENCE}, which others are compared with; there is none")
    rows = []
    for (budget, agent), of_agent in losses.items():
        reference = losses.get((budget, REFERENCE), {})
        seeds = sorted(of_agent.keys() & reference.keys())
        if agent == REFERENCE or not seeds:
            continue
        own, other = (np.stack([of[seed] for seed in seeds]) for of in (of_agent, reference))
        difference, ratio = with_spread(own - other, plain_mean), own.mean() / other.mean()
        below = sum((own - other).mean(axis=1) < 0.0)
        cells = [f"{budget}", agent, f"{len(seeds)}", f"{ratio:.3f}", number(*difference), f"{below} of {len(seeds)}"]
        rows.append((-budget, ratio, cells))
    columns = [
        "token budget",
        "agent",
        "seeds",
        "loss relative to the surrogate's",
        "minus the surrogate's",
        "seeds below",
    ]
    return Table(columns, [cells for _budget, _ratio, cells in sorted(rows)])


def further_reports_table(records: Sequence[dict[str, Any]]) -> Table:
    """What held-out contexts lose by the main evaluation, and their mean scores by the others; the least loss first.

    Args:
        records: Of one comparison over contexts of a family.

    Raises:
        ValueError: The records do not belong together.
    """
    comparison, within = Comparison(records), within_family(records[0])
    main, *others = comparison.evaluators
    rows = []
    for agent in comparison.agents:
        loss = with_spread(loss_over_dense(comparison, agent, main)[:, within], plain_mean)
        scores = [with_spread(comparison.scores(agent, name)[:, within], plain_mean) for name in others]
        rows.append((loss, [agent, comparison.seeds(agent), number(*loss), *(number(*each) for each in scores)]))
    columns = [f"{name} (dense {comparison.dense[name]:.3f})" for name in others]
    return Table(["agent", "seeds", "held-out loss over dense", *columns], [cells for _loss, cells in sorted(rows)])
