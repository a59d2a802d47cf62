"""lm-eval's tasks and their requests; what it stumbles over in them is said in one line."""

import bisect
import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import yaml
from lm_eval.tasks import TaskManager

from rap_env.errors import EvaluationFailed, RapError, UnknownName
from rap_env.evaluation.tasks import TASKS_FOLDER
from rap_env.reading import reading

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DEEPEST = 50  # levels of a YAML file


@contextlib.contextmanager
def naming(owner: str) -> Iterator[None]:
    """What lm-eval's code, or a task's own, stumbles over in a data set becomes one line that says where it is."""
    try:
        yield
    except (RapError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EvaluationFailed(f"{owner}: its data or its functions don't suit lm-eval: {reason[:300]}") from error


def load_tasks(names: list[str], include_path: str | Path | None) -> dict:
    """lm-eval's tasks by name, for names of tasks, tags or groups.

    Raises:
        UnknownName: lm-eval and the folder have no such task.
        EvaluationFailed: No name, no such folder, or a task's data can't be loaded.
    """
    if not names:
        raise EvaluationFailed("expected at least one task name; got none")
    own = [] if include_path is None else [Path(include_path).expanduser()]
    if missing := [folder for folder in own if not folder.is_dir()]:
        raise EvaluationFailed(f"evaluation.include_path: no such folder: {missing[0]}")
    for path in sorted(path for folder in own for path in folder.rglob("*.yaml")):
        _check_depth(path)
    folders = [str(folder) for folder in (TASKS_FOLDER, *own)]
    with naming(f"the tasks in {' and '.join(folders)}"):
        # Indexing lm-eval's thousands of tasks takes seconds; skip them when the folders have all that is asked for.
        manager = TaskManager(include_path=folders, include_defaults=False)
        if not set(names) <= set(manager.task_index):
            manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.task_index:
            raise UnknownName("task", name, manager.task_index)
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that takes keyword arguments
    loaded = {}
    for name in names:
        try:
            with naming(f"task {name!r}, of which lm-eval looks at item 0"):
                loaded |= manager.load([name])["tasks"]
        except OSError as error:  # of the hub or of a file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EvaluationFailed(
                f"can't load the data of {name}: {reason}. Check the network, or use evaluation=local"
            ) from error
    return dict(sorted(loaded.items()))


def _check_depth(path: Path) -> None:
    """Refuses what is nested so deeply that lm-eval's parser, which recurses in C, would end the process."""
    depth = 0
    with reading(path, "a task's YAML", EvaluationFailed):
        for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"expected at most {_DEEPEST} levels; there are more")


def build_requests(name: str, task, rows: Sequence[int]) -> None:
    """Builds `task.instances` of some rows; `EvaluationFailed` names the first that has none."""

    def build(n_rows: int) -> Exception | None:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # lm-eval draws a progress bar for every task
                task.build_all_requests(samples=rows[:n_rows])
        except Exception as error:
            return error
        return None

    if build(len(rows)) is not None:  # it does not say of which row
        first = bisect.bisect_left(range(1, len(rows) + 1), True, key=lambda n_rows: build(n_rows) is not None)
        with naming(f"task {name!r}, item {rows[first]}"):
            raise build(first + 1)
