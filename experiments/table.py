"""Writes finished evaluations of one model as a table: `python -m experiments.table RUN TABLE.npz`.

RUN is the folder of a finished run: the table is of its model, its parts in their order, and of its search text, whole
and its first window alone. All evaluations of the result store with that identity go into it, whoever asked for them,
unless they keep other parts than the first of a site.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from experiments.recipes.build import build_halves, build_llm
from experiments.recipes.folder import RECORD_NAME
from experiments.records import read_record
from rap_env.components import ATTENTION
from rap_env.errors import InvalidMask, InvalidTable, UnknownName
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.simulator import fitted
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.table import ScoreTable, about_model, save_tables
from rap_env.llm.embedded import cache_folder
from rap_env.mask import PruningMask

_ROUNDED = 0.05  # nats: what the number format may round otherwise where a mask was evaluated among others


def table_of(
    found: Iterator[tuple[dict[str, Any], dict[str, Any]]], identity: Mapping[str, Any], shape, also: Sequence[str]
) -> tuple[dict[tuple[int, ...], float], dict[str, Any]]:
    """The losses of all nested masks of an identity by widths, and what is to be told about them.

    What evaluators call the same windows does not matter, and neither does what parts were called before names held
    their order.

    Args:
        found: (identity, result) of evaluations.
        identity: Of an evaluation; its mask does not matter.
        shape: The model's.
        also: Further digests of models that are known to be the same function.

    Raises:
        InvalidTable: Two evaluations of one mask differ by more than is rounded.
    """
    losses: dict[tuple[int, ...], float] = {}
    seen: dict[str, dict] = {}
    differences = []
    dense, skipped = PruningMask.all_kept(shape), 0
    names = {component.name.partition("@")[0]: component.name for component in shape.components}
    for own, result in found:
        dropped = own.pop("dropped")
        if not _is_same(own, identity, also):
            continue
        seen[json.dumps(own, sort_keys=True)] = own
        try:
            widths = dense.drop(*(names.get(name.partition("@")[0], name) for name in dropped)).widths
        except (InvalidMask, UnknownName):
            skipped += 1
            continue
        loss = -result["score"]
        if widths in losses:
            differences.append(abs(losses[widths] - loss))
        losses[widths] = min(loss, losses.get(widths, loss))  # whatever comes first
    if max(differences, default=0.0) > _ROUNDED:
        raise InvalidTable(f"expected equal losses for equal masks; they differ by up to {max(differences):.3f} nats")
    twice = {"masks": len(differences), "largest_difference": max(differences, default=0.0)}
    return losses, {"identities": list(seen.values()), "skipped": skipped, "twice": twice}


def _is_same(own: Mapping[str, Any], identity: Mapping[str, Any], also: Sequence[str]) -> bool:
    free = ("model", "evaluator", "dropped")
    wanted = ("evaluator", "windows")
    return (
        all(own.get(key) == value for key, value in identity.items() if key not in free)
        and own["model"] in (identity["model"], *also)
        and [own["evaluator"].get(key) for key in wanted] == [identity["evaluator"][key] for key in wanted]
    )


def fitted_table(losses: Mapping[tuple[int, ...], float], shape, about: Mapping[str, Any]) -> ScoreTable:
    """A table with its simulator.

    Raises:
        InvalidTable: The dense model is not among the masks.
    """
    dense = PruningMask.all_kept(shape).widths
    if dense not in losses:
        raise InvalidTable("expected the dense model among the evaluations")
    order = sorted(losses)
    widths, values = np.array(order, dtype=np.uint8), np.array([losses[key] for key in order], dtype=np.float32)
    is_attention = np.array([site.kind == ATTENTION for site in shape.sites])
    simulator = fitted(widths, values.astype(float), np.array(dense), is_attention, float(np.float32(losses[dense])))
    return ScoreTable(widths, values, simulator, about)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, the run and the store, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("table", type=Path, help="file to write; it must not exist")
    parser.add_argument("--store", default=cache_folder() / "results.db", help="result store, as config.store")
    parser.add_argument("--also", nargs="*", default=[], help="further digests of the same model")
    options = parser.parse_args(arguments)
    if options.table.exists():
        parser.error(f"{options.table} exists, and tables are not written over")
    config = OmegaConf.create(read_record(options.run / RECORD_NAME)["config"])
    llm, _corpus = build_llm(config)
    whole = build_halves(config.evaluation, llm).search
    tables = []
    for evaluator in (whole, whole.first(1 / len(whole.windows))):
        meter = Meter(llm, evaluator)
        found = ResultStore(options.store).evaluations(evaluator.identity["windows"])
        losses, about = table_of(found, meter.identity(llm.mask), llm.shape, options.also)
        about |= {"name": evaluator.name, "windows": list(evaluator.windows.shape), "tokens": meter.tokens_each}
        tables.append(fitted_table(losses, llm.shape, about))
        twice = about["twice"]
        print(
            f"{len(losses):,} masks of {meter.tokens_each:,} tokens, {about['skipped']} skipped; {twice['masks']} were"
            f" evaluated twice and differ by up to {twice['largest_difference']:.4f} nats",
            flush=True,
        )
    save_tables(options.table, tables, about_model(llm))


if __name__ == "__main__":
    main()
