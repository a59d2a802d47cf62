"""Trackers: where a run's metrics, tables and images go while it runs."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np


class Tracker(Protocol):
    """What a run reports its progress to; also a context manager that closes itself."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports numbers at a step."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Reports a table; a later one of the same name takes its place."""

    def log_image(self, name: str, rgb: np.ndarray) -> None:
        """Reports an image, uint8 [height, width, 3]; a later one of the same name takes its place."""

    def close(self, failed: bool = False) -> None:
        """Flushes and ends, as failed or not; nothing may be logged after it, and a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def _cell(value: object) -> str | int | float | bool | None:
    """A value as JSON and tables take it: None for NaN and infinities, text for anything but numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


class NoTracker(Tracker):
    """Forgets everything."""


class JsonlTracker(Tracker):
    """Writes plain files: `metrics.jsonl`, `<table>.json` and `<image>.png`.

    A slash in a name makes a subfolder. The folder belongs to one run: what another left in it is replaced.

    Args:
        folder: Where the files go; it is made if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line; a number that is not finite becomes null, as JSON has no NaN."""
        line = {"step": int(step)} | {name: _cell(float(value)) for name, value in metrics.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes `{"columns": ..., "rows": ...}`."""
        table = {"columns": list(columns), "rows": [[_cell(value) for value in row] for row in rows]}
        self._path(name, ".json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")

    def log_image(self, name: str, rgb: np.ndarray) -> None:
        from matplotlib.image import imsave  # here: it takes long to import, and runs that track nothing don't need it

        imsave(self._path(name, ".png"), rgb)

    def close(self, failed: bool = False) -> None:
        self._metrics.close()

    def _path(self, name: str, suffix: str) -> Path:
        path = self.folder / f"{name}{suffix}"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"expected a name inside the tracker's folder; got {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class WandbTracker(Tracker):
    """Reports to Weights & Biases, or without an API key to a folder that `wandb sync` can upload later.

    `WANDB_MODE` has the last word if it is set; otherwise the run is online exactly if `WANDB_API_KEY` is set.

    Args:
        folder: Where wandb keeps the run's files, in a subfolder `wandb`.
        project: The project that the run belongs to.
        config: What the run was started with, as plain values.
        name: The run's name; by default wandb makes one up.
    """

    def __init__(self, folder: str | Path, project: str, config: Mapping[str, Any], name: str | None = None) -> None:
        import wandb  # here, so that a run without it neither needs nor waits for it

        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it takes our `agents` for another package, and says so
        Path(folder).mkdir(parents=True, exist_ok=True)
        default_mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self._wandb = wandb
        self._run = wandb.init(
            dir=str(folder),
            project=project,
            config=dict(config),
            name=name,
            mode=os.environ.get("WANDB_MODE") or default_mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own step drops whatever comes with a smaller one, and every image would advance it; ours is a metric
        self._step = 0
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = int(step)
        self._send({name: float(value) for name, value in metrics.items()})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        cells = [[_cell(value) for value in row] for row in rows]
        self._send({name: self._wandb.Table(columns=list(columns), data=cells, allow_mixed_types=True)})

    def log_image(self, name: str, rgb: np.ndarray) -> None:
        self._send({name: self._wandb.Image(rgb)})

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))
        self._wandb.teardown()  # ends the service process, which would outlive the run

    def _send(self, values: dict[str, Any]) -> None:
        self._run.log({"step": self._step} | values)
