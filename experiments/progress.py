"""Progress of a run's phases, with an estimate of the time that is left."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Phases:
    """One progress bar for each phase, on stderr; where that is no terminal, a line every ten seconds."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:>20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, name: str) -> Callable[[int, int], None]:
        """Opens a phase and returns the function that moves it, called with (done, total)."""
        bar = self._progress.add_task(name, total=None)
        printed_seconds = 0.0
        first: tuple[int, float] | None = (
            None  # what came before the first report is set-up and tells nothing of the rest
        )

        def advance(done: int, total: int) -> None:
            nonlocal printed_seconds, first
            self._progress.update(bar, completed=done, total=total)
            elapsed = self._progress.tasks[bar].elapsed or 0.0
            first = first or (done, elapsed)
            if not self._console.is_terminal and (done == total or elapsed > printed_seconds + 10):
                printed_seconds = elapsed
                steps, seconds = done - first[0], elapsed - first[1]
                left = f", about {seconds * (total - done) / steps:.0f} s left" if steps and done < total else ""
                self._console.print(f"{name}: {done}/{total} after {elapsed:.0f} s{left}", soft_wrap=True)

        return advance
