"""A Hydra callback that ends every sweep with the report over its records."""

import atexit
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.records import read_records

PAGE_NAME = "page.html"


class SweepReport(Callback):
    """Prints the report, and writes its page into the sweep's folder, also of a sweep of which jobs have failed."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # Hydra raises what a job raised when all have run, and then does not call on_multirun_end
        atexit.register(report_sweep, Path(config.hydra.sweep.dir))


def report_sweep(folder: Path) -> None:
    """Prints the report over the records of a sweep, and writes its page."""
    from experiments.report import report_on  # here, for its plotting takes longer to import than a small job to run

    try:
        lines = report_on(read_records(folder), folder / PAGE_NAME)
    except ValueError as error:  # no job has finished, or they differ in what may not differ within a table
        lines = [f"no report: {error}"]
    print("\n".join([*lines, f"records: {folder}"]), flush=True)
