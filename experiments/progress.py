"""Progress of a phase of a run, with an estimate of the time that is left."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def phase(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; where that is no terminal, a line every ten seconds.

    Yields:
        The function that moves it, called with (done, total).
    """
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "ETA", TimeRemainingColumn())
    with Progress("{task.description:>20}", *columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=None)
        printed_seconds = 0.0
        # Of the present total; what came before its first report is set-up, or was counted in other units.
        first: tuple[int, float, int] | None = None

        def advance(done: int, total: int) -> None:
            nonlocal printed_seconds, first
            progress.update(bar, completed=done, total=total)
            elapsed = progress.tasks[bar].elapsed or 0.0
            if first is None or first[2] != total:
                first = done, elapsed, total
            if not console.is_terminal and (done == total or elapsed > printed_seconds + 10):
                printed_seconds = elapsed
                steps, seconds = done - first[0], elapsed - first[1]
                left = f", about {seconds * (total - done) / steps:.0f} s left" if steps and done < total else ""
                console.print(f"{name}: {done}/{total} after {elapsed:.0f} s{left}", soft_wrap=True)

        yield advance
