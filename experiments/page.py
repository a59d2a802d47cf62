"""The page of a comparison: one HTML file that loads nothing, the same to the bit for the same records."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from experiments.comparison import Comparison
from experiments.figures import Exhibit, exhibits
from experiments.merit import merit_table, spending_table

_TEMPLATE = Path(__file__).with_name("page.html")
_OPTIONS = {"displayModeBar": False, "responsive": True}


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Writes the page, in place of an older one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(comparison), encoding="utf-8")
    return path


def page(comparison: Comparison) -> str:
    """The page's text."""
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Comparison of pruning policies",
        plotly=get_plotlyjs(),
        summary=html.escape(_summary(comparison)),
        merits=_table(*merit_table(comparison)),
        spending=_table(*spending_table(comparison)),
        sections="\n".join(map(_section, exhibits(comparison))),
        origin=html.escape(_origin(comparison)),
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = "\n".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return f"<thead><tr>{_cells('th', columns)}</tr></thead>\n<tbody>\n{lines}\n</tbody>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _section(exhibit: Exhibit) -> str:
    drawn = to_html(
        exhibit.figure, config=_OPTIONS, include_plotlyjs=False, full_html=False, div_id=f"figure-{exhibit.name}"
    )
    title, caption = html.escape(exhibit.title), html.escape(exhibit.caption)
    return f"<section>\n<h2>{title}</h2>\n<p>{caption}</p>\n{drawn}\n</section>"


def _summary(comparison: Comparison) -> str:
    config = comparison.records[0]["config"]
    dense = ", ".join(_dense(comparison, judge) for judge in comparison.judges)
    return (
        f"{config['model']['name']}: {len(comparison.records)} searches of {len(comparison.agents)} agents, each with"
        f" at most {config['max_evaluations']} evaluations, on {len(comparison.scenarios)} scenarios."
        f" The dense model reaches {dense}."
    )


def _dense(comparison: Comparison, judge: str) -> str:
    score = comparison.dense_score(judge)
    quality = f"perplexity {math.exp(-score):.2f}" if comparison.is_text(judge) else f"accuracy {score:.3f}"
    return f"{quality} on {judge}"


def _origin(comparison: Comparison) -> str:
    """What all records share, and the commits that they were made with."""
    first = comparison.records[0]
    commits = {json.dumps(record["provenance"].get("git"), sort_keys=True) for record in comparison.records}
    shared = {
        "config": {key: value for key, value in first["config"].items() if key not in ("agent", "seed")},
        "agents": {record["results"]["agent"]: record["config"]["agent"] for record in comparison.records},
        "ranking": first["results"]["ranking"],
        "versions": first["provenance"].get("versions"),
        "hardware": first["provenance"].get("hardware"),
        "git": [json.loads(commit) for commit in sorted(commits)],
    }
    return json.dumps(shared, indent=2, sort_keys=True)
