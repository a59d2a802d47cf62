"""What serving with each of a ladder of masks costs, as measured: bytes, quality and seconds. Without the model."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from rap_env.errors import InvalidTable
from rap_env.files import write_once
from rap_env.reading import reading

_MEASURED = Path(__file__).parent / "measured"
_EMBEDDED = "smollm2-135m"


@dataclass(frozen=True)
class Level:
    """One mask of the ladder.

    Attributes:
        name: What it is called.
        kept_share: Share of the weights of all components that it keeps.
        weight_bytes: What these weights take.
        kv_bytes_per_token: What each cached token takes.
        loss_over_dense: Mean next-token loss minus that of the dense model, in nats.
        base_seconds: What a step takes whatever it reads.
        prompt_token_seconds: What each prompt token adds that a step reads.
        sequence_seconds: What each sequence adds of which a step generates the next token from the last one.
        switch_seconds: What going to it takes, whatever moves: the dense model's layers need no cutting.
    """

    name: str
    kept_share: float
    weight_bytes: int
    kv_bytes_per_token: int
    loss_over_dense: float
    base_seconds: float
    prompt_token_seconds: float
    sequence_seconds: float
    switch_seconds: float

    @property
    def quality(self) -> float:
        """Perplexity of the dense model over that of the masked one; 1 for the dense one."""
        return math.exp(-self.loss_over_dense)


@dataclass(frozen=True)
class ServingTable:
    """A ladder of masks, from the dense one down, and what serving with them costs.

    A step reads the last token of each sequence that generates and a chunk of prompts. With a level's numbers it takes

        base + prompt token * prompt tokens read + sequence * sequences generating + cached token * cached tokens

    seconds, where cached tokens are those that all sequences of the step attend to. Going to another level takes

        switch of that level + (byte down or byte up) * bytes of weights that go or come.

    Attributes:
        levels: At least two: each keeps less than the one before, and its loss is at least as high.
        fixed_bytes: Weights that are always there.
        activation_bytes: What a step takes beside weights and cache, at most.
        max_batch: Sequences in flight at most, which the activations are for.
        read_tokens: Tokens that a step reads at most, which the activations are for.
        cached_token_seconds: What each cached token adds to a step.
        byte_down_seconds: What each byte of weights adds that leaves.
        byte_up_seconds: What each byte of weights adds that comes back.
        measured: How it was measured: model, machine, errors of the fit. Nothing is computed from it.

    Raises:
        InvalidTable: Something is no number, out of its range, or not in order; the message names it.
    """

    levels: tuple[Level, ...]
    fixed_bytes: int
    activation_bytes: int
    max_batch: int
    read_tokens: int
    cached_token_seconds: float
    byte_down_seconds: float
    byte_up_seconds: float
    measured: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if len(self.levels) < 2:
            raise InvalidTable(f"levels: expected at least two; got {len(self.levels)}")
        if len({level.name for level in self.levels}) < len(self.levels):
            raise InvalidTable("levels: expected a name of its own for each; got one twice")
        for level in self.levels:
            _check_numbers(level, f"level {level.name!r}: ")
            if level.base_seconds == 0.0:
                raise InvalidTable(f"level {level.name!r}: base_seconds: expected more than 0")
        _check_numbers(self, "")
        if not 1 <= self.max_batch <= self.read_tokens:
            raise InvalidTable(f"expected 1 <= max_batch <= read_tokens; got {self.max_batch} and {self.read_tokens}")
        for above, below in pairwise(self.levels):
            if below.weight_bytes >= above.weight_bytes or below.kv_bytes_per_token > above.kv_bytes_per_token:
                raise InvalidTable(f"level {below.name!r}: expected fewer bytes than {above.name!r} before it")
            if below.loss_over_dense < above.loss_over_dense or below.kept_share >= above.kept_share:
                raise InvalidTable(f"level {below.name!r}: expected a smaller share and no less loss than before it")

    def needed_bytes(self, level: int, n_tokens: int) -> int:
        """What a level takes with a cache for so many tokens."""
        row = self.levels[level]
        return self.fixed_bytes + self.activation_bytes + row.weight_bytes + row.kv_bytes_per_token * n_tokens

    def step_seconds(self, level: int, n_prompt_tokens: int, n_sequences: int, n_cached_tokens: int) -> float:
        """What a step takes; see above."""
        row = self.levels[level]
        own = row.base_seconds + row.prompt_token_seconds * n_prompt_tokens + row.sequence_seconds * n_sequences
        return own + self.cached_token_seconds * n_cached_tokens

    def switching_seconds(self, before: int, after: int) -> float:
        """What going from one level to another takes; nothing for the same."""
        if before == after:
            return 0.0
        moved = self.levels[before].weight_bytes - self.levels[after].weight_bytes
        bytes_seconds = self.byte_down_seconds * moved if moved > 0 else -self.byte_up_seconds * moved
        return self.levels[after].switch_seconds + bytes_seconds

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON; returns the path.

        Raises:
            FileExistsError: There is such a file already.
        """
        return write_once(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ServingTable":
        """Reads what `save` wrote.

        Raises:
            InvalidTable: The file can't be read, is no such JSON, or no such table.
        """
        with reading(path, "a serving table", InvalidTable):
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = _matching(cls, data, "the table")["levels"]
            if not isinstance(rows, list):
                raise InvalidTable(f"levels: expected a list; got {type(rows).__name__}")
            return cls(**{**data, "levels": tuple(Level(**_matching(Level, row, "a level")) for row in rows)})


@cache
def embedded_table() -> ServingTable:
    """The table of the embedded model, as measured on two cores; its losses are stand-ins (see its `measured`)."""
    return ServingTable.load(_MEASURED / f"{_EMBEDDED}.json")


def _matching(cls: type, data: object, what: str) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    if not isinstance(data, dict):
        raise InvalidTable(f"{what}: expected a JSON object; got {type(data).__name__}")
    if set(data) != names:
        missing, unknown = sorted(names - set(data)), sorted(set(data) - names)
        raise InvalidTable(
            f"{what}: missing: {', '.join(missing) or 'nothing'}; unknown: {', '.join(unknown) or 'none'}"
        )
    return data


def _check_numbers(row: Level | ServingTable, where: str) -> None:
    """Refuses what is not a finite number of at least 0, whole where it has to be."""
    for field in fields(row):
        value = getattr(row, field.name)
        if field.type in (int, float):
            whole = field.type is int
            ok = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not ok or not (math.isfinite(value) and value >= 0):
                expected = "a whole number" if whole else "a finite number"
                raise InvalidTable(f"{where}{field.name}: expected {expected} of at least 0; got {value!r}")
        elif field.type is str and not (isinstance(value, str) and value):
            raise InvalidTable(f"{where}{field.name}: expected a name; got {value!r}")
