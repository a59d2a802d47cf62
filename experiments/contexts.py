"""Whether masks should depend on the kind of context: `python -m experiments.contexts PART RECORD`.

For each kind of context good masks are found on two disjoint draws of text, and every mask is measured in every kind of
context on the report half. What a mask of another kind loses to a column's own is held against what the other draw of
the same kind loses. Parts:

    length   prose read with 64 or 1,024 tokens of context, the same tokens scored; KV heads are dropped
    kinds    prose, code, dialogue and questions with 128 tokens of context; KV heads and channel groups are dropped
    recall   the masks of `length`, by how well they find a fact again that stood early in 256 or 512 tokens

A killed run is resumed by running it again: what was measured is in the result store.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.context_masks import (
    half_costs,
    head_costs,
    part_costs,
    scores_of,
    without_cheapest_bytes,
    without_cheapest_heads,
)
from experiments.context_texts import Sizes, Texts
from experiments.progress import phase
from experiments.records import provenance, write_record
from rap_env.calibration import packaged_corpus, random_windows
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.store import ResultStore
from rap_env.llm.embedded import cache_folder
from rap_env.llm.loading import load_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.widths.prepare import prepare_widths

WORKLOAD = Workload(8, 1024)  # what bytes are counted for
DRAWS = 2
_ORDERING = (8, 256)  # windows and tokens of packaged text, by which the channel groups of a site are ordered


@dataclass(frozen=True)
class Part:
    """Which kinds of context are compared.

    Attributes:
        rows: Kinds of context that masks are found for.
        columns: Kinds that they are measured in.
        heads: How many KV heads are dropped.
        budget_ratios: Parts of the dense model's bytes that masks of heads and channel groups take.
        dense_only: Kinds that only the dense model is measured in.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    heads: tuple[int, ...] = ()
    budget_ratios: tuple[float, ...] = ()
    dense_only: tuple[str, ...] = ()


_KINDS = ("prose 128", "code 128", "dialogue 128", "questions 128")
PARTS = {
    "length": Part(("prose 64", "prose 1024"), ("prose 64", "prose 256", "prose 1024"), heads=(15, 30)),
    "kinds": Part(_KINDS, _KINDS, budget_ratios=(0.85, 0.7)),
    "recall": Part(
        ("prose 64", "prose 1024"), ("recall 256", "recall 512"), heads=(30,), dense_only=("recall 128", "recall 1024")
    ),
}

Progress = Callable[[int, int], None]


def measure(
    llm: SwitchableLLM, texts: Texts, part: Part, store: ResultStore | None, progress: Progress
) -> dict[str, Any]:
    """Finds masks and measures them.

    Returns:
        `costs` of components by row, one mapping for each draw; `masks` and `measured` by selection, row and draw, the
        latter by column: a list with the loss on each window, or for recall its metrics; `dense`, the same of the
        unpruned model by column; `search_tokens` of a draw by row.
    """
    steps = [(row, draw) for row in part.rows for draw in range(DRAWS)]
    n_steps, costs, tokens = len(steps) + 1 + DRAWS * len(part.rows), {}, {}
    for number, (row, draw) in enumerate(steps):
        progress(number, n_steps)
        meter = Meter(llm, texts.search(row, draw), store)
        costs.setdefault(row, []).append(_costs(meter, bool(part.budget_ratios)))
        tokens[row] = meter.budget.spent
    columns = {column: [Meter(llm, each, store) for each in texts.report(column)] for column in part.columns}
    dense_only = {column: [Meter(llm, each, store) for each in texts.report(column)] for column in part.dense_only}
    progress(len(steps), n_steps)
    dense = {
        name: _measured(PruningMask.all_kept(llm.shape), meters) for name, meters in (columns | dense_only).items()
    }
    masks, measured = {}, {}
    for number, (row, draw) in enumerate(steps, len(steps) + 1):
        progress(number, n_steps)
        for name, mask in _selected(llm, costs[row][draw], part).items():
            masks.setdefault(name, {}).setdefault(row, []).append([one.name for one in mask.dropped])
            of_mask = {column: _measured(mask, meters) for column, meters in columns.items()}
            measured.setdefault(name, {}).setdefault(row, []).append(of_mask)
    return {"costs": costs, "masks": masks, "measured": measured, "dense": dense, "search_tokens": tokens}


def _costs(meter: Meter, of_parts: bool) -> dict[str, dict[str, float]]:
    """Measured costs: of heads, and of the last halves of MLPs."""
    halves = {str(site): cost for site, cost in half_costs(meter).items()} if of_parts else {}
    return {"heads": head_costs(meter), "halves": halves}


def _selected(llm: SwitchableLLM, costs: Mapping[str, Mapping[str, float]], part: Part) -> dict[str, PruningMask]:
    shape = llm.shape
    masks = {f"{n} KV heads dropped": without_cheapest_heads(shape, costs["heads"], n) for n in part.heads}
    if part.budget_ratios:
        sites = {str(site): site for site in shape.sites}
        halves = {sites[name]: cost for name, cost in costs["halves"].items()}
        of_all = {**costs["heads"], **part_costs(shape, halves, scores_of(llm))}
        for ratio in part.budget_ratios:
            masks[f"{100 * ratio:.0f}% of all bytes"] = without_cheapest_bytes(shape, of_all, WORKLOAD, ratio)
    return masks


def _measured(mask: PruningMask, meters: Sequence[Meter]) -> Any:
    """The loss on each window; for recall its metrics."""
    evaluated = [meter.evaluate([mask])[0] for meter in meters]
    if len(meters) == 1 and "smooth_acc" in (metrics := next(iter(evaluated[0].tasks.values()))):
        return {name: metrics[name] for name in ("acc", "smooth_acc", "items")}
    return [-evaluation.score for evaluation in evaluated]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("record", type=Path, help="JSON file to write; it must not exist")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with text/ and lm_eval_tasks/")
    parser.add_argument("--search-windows", type=int, default=Sizes.search_windows, help="of each draw")
    parser.add_argument("--report-windows", type=int, default=Sizes.report_windows)
    parser.add_argument("--report-items", type=int, default=Sizes.report_items, help="of recall at each length")
    options = parser.parse_args(arguments)
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    origin = provenance()  # before the run, which takes minutes
    sizes = Sizes(options.search_windows, options.report_windows, report_items=options.report_items)
    llm = load_llm(granularity="group")
    prepare_widths(llm, random_windows(packaged_corpus(), llm.tokenizer, *_ORDERING, seed=0))
    texts = Texts(llm, options.shared, sizes)
    with ResultStore(cache_folder() / "results.db") as store, phase(options.part) as progress:
        results = measure(llm, texts, PARTS[options.part], store, progress)
    config = {"part": options.part, "draws": DRAWS, **vars(sizes), "workload": str(WORKLOAD), "ordering": _ORDERING}
    print(write_record(options.record, {"config": config, "provenance": origin, "results": results}))


if __name__ == "__main__":
    main()
