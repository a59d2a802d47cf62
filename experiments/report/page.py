"""The page of a comparison: one HTML file that loads nothing, byte-identical for the same records."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from experiments.report.comparison import Comparison
from experiments.report.drawing import PageFigure, drawn
from experiments.report.figures import figures
from experiments.report.metrics import SPREAD
from experiments.report.tables import Table, metrics_table, notes, spending_table
from rap_env.files import write_over

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Writes the page, in place of an older one."""
    return write_over(Path(path), page(comparison))


def page(comparison: Comparison) -> str:
    """The page's text."""
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Comparison of pruning policies",
        plotly=get_plotlyjs(),
        summary=html.escape(_summary(comparison)),
        spread=SPREAD,
        metrics=_table(metrics_table(comparison)),
        notes=" ".join(html.escape(note) for note in notes(comparison.records)),
        spending=_table(spending_table(comparison)),
        sections="\n".join(map(_section, figures(comparison))),
        origin=html.escape(_origin(comparison)),
    )


def _table(table: Table) -> str:
    lines = "\n".join(f"<tr>{_cells('td', row)}</tr>" for row in table.rows)
    return f"<thead><tr>{_cells('th', table.columns)}</tr></thead>\n<tbody>\n{lines}\n</tbody>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _section(shown: PageFigure) -> str:
    title, caption = html.escape(shown.title), html.escape(shown.caption)
    return f"<section>\n<h2>{title}</h2>\n<p>{caption}</p>\n{drawn(shown)}\n</section>"


def _summary(comparison: Comparison) -> str:
    config = comparison.records[0]["config"]
    dense = ", ".join(_dense(comparison, evaluator) for evaluator in comparison.evaluators)
    return (
        f"{config['model']['name']}: {len(comparison.records)} searches of {len(comparison.agents)} agents, each with"
        f" at most {comparison.token_budget} forwarded tokens, on {len(comparison.scenarios)} scenarios."
        f" The dense model reaches {dense}."
    )


def _dense(comparison: Comparison, evaluator: str) -> str:
    score = comparison.dense[evaluator]
    quality = f"perplexity {math.exp(-score):.2f}" if comparison.is_text[evaluator] else f"accuracy {score:.3f}"
    return f"{quality} on {evaluator}"


def _origin(comparison: Comparison) -> str:
    """What all records share, and where they were made."""
    first = comparison.records[0]
    differing = {
        key: sorted({json.dumps(record["provenance"].get(key), sort_keys=True) for record in comparison.records})
        for key in ("git", "versions", "hardware", "numeric_platform")
    }
    shared = {
        "config": {key: value for key, value in first["config"].items() if key not in ("agent", "seed")},
        "agents": {record["results"]["agent"]: record["config"]["agent"] for record in comparison.records},
        "repeated_items": first["results"].get("repeated_items"),
    }
    provenance = {key: [json.loads(text) for text in texts] for key, texts in differing.items()}
    return json.dumps(shared | provenance, indent=2, sort_keys=True)
