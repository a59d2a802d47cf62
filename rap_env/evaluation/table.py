"""Finished evaluations as data: scores of thousands of masks without a language model, to study agents on.

Masks that were measured have their measured score. Others have what a simulator predicts, so that what an agent gains
here is a claim about this table; claims about the model are decided on the model.
"""

import functools
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rap_env.errors import InvalidMask, InvalidTable, InvalidWorkload
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.simulator import Simulator
from rap_env.files import write_once
from rap_env.llm.prepared import Preparation
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.reading import reading, unpacked_arrays

TABLES = Path(__file__).parent / "tables"
EMBEDDED_TABLE = "smollm2-135m"


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Measured masks of one model on one text, and what predicts the others.

    Shapes: N masks, S sites.

    Attributes:
        widths: Kept parts of each site [N, S] uint8.
        losses: Measured mean losses [N] float32, in nats.
        simulator: Predicts other masks.
        about: As JSON holds it: `name` of the text, its `windows`, the `tokens` of an evaluation, the `identities` of
            the evaluations in the store, and how many masks were `skipped`.

    Raises:
        InvalidTable: An array has another type or shape, or a loss is not finite.
    """

    widths: np.ndarray
    losses: np.ndarray
    simulator: Simulator
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        n_masks, n_sites = len(self.losses), len(self.simulator.n_parts)
        for name, dtype, shape in (("widths", "uint8", (n_masks, n_sites)), ("losses", "float32", (n_masks,))):
            values = getattr(self, name)
            if values.dtype != dtype or values.shape != shape:
                raise InvalidTable(f"{name}: expected {dtype} {list(shape)}; got {values.dtype} {list(values.shape)}")
        if not np.isfinite(self.losses).all():
            raise InvalidTable("losses: expected finite numbers")

    @functools.cached_property
    def _measured(self) -> dict[bytes, float]:
        return dict(zip(map(bytes, self.widths), self.losses.astype(float).tolist(), strict=True))

    def look_up(self, masks: Sequence[PruningMask]) -> list[tuple[float, bool]]:
        """The loss of each mask, and whether it was measured.

        A mask that keeps other parts than the first of a site counts as one that keeps as many, but the first.
        """
        keys = [bytes(mask.n_kept) for mask in masks]
        found = [(self._measured.get(key), True) for key in keys]
        missing = [index for index, (loss, _measured) in enumerate(found) if loss is None]
        if missing:
            widths = np.frombuffer(b"".join(keys[index] for index in missing), dtype=np.uint8)
            predicted = self.simulator.losses(widths.reshape(len(missing), -1))
            for index, loss in zip(missing, predicted.tolist(), strict=True):
                found[index] = round(loss, 6), False  # other machines sum in another order
        return found


class TableEvaluator(Evaluator):
    """Minus the mean loss that a table has for a mask.

    Args:
        table: Where it looks.
        digest: That of the file.
        name: Of the text; by default the table's.
    """

    runs_model = False

    def __init__(self, table: ScoreTable, digest: str, name: str | None = None) -> None:
        self.table, self._digest = table, digest
        self.name = f"table of {name or table.about['name']}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"evaluator": "table", "name": self.name, "table": self._digest, "tokens": self.table.about["tokens"]}

    def tokens(self, llm: "TableModel") -> int:
        """What evaluating the mask on the model forwards, so that token budgets mean the same."""
        return self.table.about["tokens"]

    def evaluate_many(
        self, llm: "TableModel", masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        for mask, (loss, is_measured) in zip(masks, self.table.look_up(masks), strict=True):
            yield mask, self.evaluation(loss, is_measured)

    def evaluation(self, loss: float, is_measured: bool) -> Evaluation:
        """A loss as evaluations have it; the metric `measured` is 1 where it was, and 0 where it is predicted."""
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "measured": int(is_measured)}
        metrics["items"] = self.table.about["windows"][0]
        return Evaluation(-loss, {self.name: metrics}, self.table.about["tokens"], 0.0)


class TableModel:
    """Stands where a `SwitchableLLM` stands, for evaluations that tables answer; nothing can be run on it.

    Args:
        tables: One for each number of tokens that an evaluation forwards, the main one first.
        about: `name`, `shape`, `digest`, `tokenizer_digest`, `dtype` and `preparation` of the model.
        digest: That of the file.

    Attributes:
        shape: The model's `ModelShape`.
        tables: As they were given.
        evaluator: Looks masks up in the main table.
    """

    def __init__(self, tables: Sequence[ScoreTable], about: Mapping[str, Any], digest: str) -> None:
        self.name, self.digest, self.tokenizer_digest = about["name"], about["digest"], about["tokenizer_digest"]
        self.shape = ModelShape.from_dict(about["shape"])
        self.dtype, self.device = getattr(torch, about["dtype"]), torch.device("cpu")
        self.preparation = Preparation(**about["preparation"])
        self.mask, self.tokenizer = PruningMask.all_kept(self.shape), None
        self.tables, self._about, self._file_digest = tuple(tables), about, digest
        self.evaluator = TableEvaluator(tables[0], digest)

    def check(self, mask: PruningMask) -> None:
        """Refuses masks of other models.

        Raises:
            InvalidMask: The mask's components are not this model's.
        """
        if mask.components is not self.shape.components and mask.components != self.shape.components:
            raise InvalidMask(
                f"expected a mask over this table's {len(self.shape.components)} components; got {len(mask.keep)}"
            )

    def with_tables(self, tables: Sequence[ScoreTable]) -> "TableModel":
        """The same with other tables, of an identity of their own."""
        content = b"".join(table.widths.tobytes() + table.losses.tobytes() for table in tables)
        return TableModel(tables, self._about, hashlib.sha256(content).hexdigest())

    def answering(self, evaluator: Evaluator) -> TableEvaluator:
        """The table that answers for an evaluator: that of as many tokens.

        Raises:
            InvalidWorkload: There is no such table.
        """
        known = {table.about["tokens"]: table for table in self.tables}
        if (tokens := evaluator.tokens(self)) not in known:
            raise InvalidWorkload(f"no table of {tokens} tokens an evaluation; there are tables of {sorted(known)}")
        return TableEvaluator(known[tokens], self._file_digest, evaluator.name)


def save_tables(path: Path, tables: Sequence[ScoreTable], about: Mapping[str, Any]) -> None:
    """Writes tables of one model into a file that `load_tables` reads.

    Raises:
        FileExistsError: The file exists.
    """
    arrays: dict[str, np.ndarray] = {}
    for index, table in enumerate(tables):
        own = {"widths": table.widths, "losses": table.losses, **table.simulator.arrays()}
        arrays |= {f"{index}.{name}": values for name, values in own.items()}
    described = json.dumps(dict(about) | {"tables": [dict(table.about) for table in tables]})
    content = io.BytesIO()
    np.savez_compressed(content, about=np.array(described), **arrays)
    write_once(path, content.getvalue())


def load_tables(name: str = EMBEDDED_TABLE) -> TableModel:
    """The tables that ship with the package, by their model's name, or those of a file.

    Raises:
        InvalidTable: There are no such tables, or the file holds something else.
    """
    path = Path(name).expanduser() if name.endswith(".npz") else TABLES / f"{name}.npz"
    known = ", ".join(sorted(known.stem for known in TABLES.glob("*.npz")))
    with reading(path, f"tables of finished evaluations (the package has {known})", InvalidTable):
        content = path.read_bytes()
        arrays = unpacked_arrays(content)
        about = json.loads(arrays["about"].item())
        tables = [_table(index, arrays, own) for index, own in enumerate(about.pop("tables"))]
        return TableModel(tables, about, hashlib.sha256(content).hexdigest())


def _table(index: int, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> ScoreTable:
    own = {name.partition(".")[2]: arrays[name] for name in arrays if name.startswith(f"{index}.")}
    return ScoreTable(own["widths"], own["losses"], Simulator.from_arrays(own), about)


def about_model(llm) -> dict[str, Any]:
    """What a `TableModel` is built from.

    Args:
        llm: The `SwitchableLLM` that was evaluated.
    """
    return {
        "name": llm.name,
        "shape": llm.shape.to_dict(),
        "digest": llm.digest,
        "tokenizer_digest": llm.tokenizer_digest,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "preparation": asdict(llm.preparation),
    }
