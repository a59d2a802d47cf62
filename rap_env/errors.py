"""The errors this package raises on bad input; each message says what was expected, what came, and what is known."""

import difflib
from collections.abc import Collection, Iterable, Sequence


class RapError(Exception):
    """Base of every error that the package raises on purpose."""


class UnknownName(RapError, KeyError):
    """A component, model, agent, task or policy kind that nothing is registered under.

    Args:
        kind: What was looked up, as a user would call it ("component", "model", ...).
        name: The name that was given.
        known: The names that would have worked.
        suggest: Whether a close name may be what was meant; otherwise the known ones are listed.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], suggest: bool = True) -> None:
        known = sorted(known)
        self._arguments = kind, name, known, suggest
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) if suggest else []
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known[:12])}"
        more = f" (and {len(known) - 12} more)" if not close and len(known) > 12 else ""
        super().__init__(f"unknown {kind} {name!r}; {hint}{more}")

    def __str__(self) -> str:
        return self.args[0]  # KeyError would print the repr

    def __reduce__(self) -> tuple:
        return type(self), self._arguments  # so that it crosses process borders


def check_known(kind: str, name: str, known: Collection[str]) -> str:
    """A name, once it is sure to be known; raises `UnknownName` otherwise."""
    if name not in known:
        raise UnknownName(kind, name, known)
    return name


class InvalidMask(RapError, ValueError):
    """A pruning mask that does not belong to the model: wrong length, wrong values, or components of another shape."""


class InvalidWorkload(RapError, ValueError):
    """A batch size or length that is not a positive integer, or that is beyond the model's context."""


class InvalidReward(RapError, ValueError):
    """Reward terms and weights that do not match, or a term that is not a finite number."""


class InfeasibleBudget(RapError, ValueError):
    """A memory budget that no pruning mask can meet.

    Attributes:
        budget_bytes: The budget that was asked for.
        smallest_bytes: What the model needs for the workload with every component dropped.
    """

    def __init__(self, budget_bytes: float, smallest_bytes: int, workload: object) -> None:
        self._arguments = budget_bytes, smallest_bytes, workload
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        super().__init__(
            f"no pruning mask fits {budget_bytes:,.0f} bytes for {workload}: with every component dropped"
            f" the model still needs {smallest_bytes:,} bytes"
        )

    def __reduce__(self) -> tuple:
        return type(self), self._arguments  # so that it crosses process borders


class ModelUnavailable(RapError, OSError):
    """A model that can't be loaded: no such folder, no network, a gated repository, or weights in an unsafe format."""


class UnsupportedArchitecture(RapError, ValueError):
    """A model whose layers the architecture table does not describe."""


class EvaluationFailed(RapError, ValueError):
    """Tasks that can't be scored: none named, no multiple-choice form, or no such metric."""


class RankingFailed(RapError, ValueError):
    """Documents that can't be ranked: a request or a prompt of another form, or scores that are not finite."""


class PathsUnreadable(RapError, ValueError):
    """Recorded score paths that are damaged, of another form, or do not fit together."""


class CompensationFailed(RapError, ValueError):
    """Compensation that can't be computed, or a mask that it does not hold for."""


class ContaminationFound(RapError, ValueError):
    """Calibration text that shares 13-grams with evaluation items, or a search task used for reporting."""


class WorkersFailed(RapError, RuntimeError):
    """Workers that do not start, that hold another model than the driver, or that die of a mask again and again."""


class WeightsReleased(RapError, ValueError):
    """Components that are not in memory, and that something would run on.

    Args:
        names: Of the components.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._arguments = (list(names),)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
        super().__init__(f"the weights of {shown} are not in memory: restore them first")

    def __reduce__(self) -> tuple:
        return type(self), self._arguments


class WeightsUnavailable(RapError, OSError):
    """Weights that a store can't keep or give back: its file can't be written, or is not what was written."""


class CorpusUnavailable(RapError, OSError):
    """A calibration corpus that is missing, empty or too short for the samples asked of it."""


class StoreDamaged(RapError, OSError):
    """A result store that can't be read; it is left exactly as it was found."""


class StoreUnavailable(RapError, OSError):
    """A sound result store that can't be used now: locked, full, unreachable, not permitted, or without its driver."""


class PolicyUnreadable(RapError, ValueError):
    """A policy folder that holds anything but the expected JSON and safetensors."""


class RecordExists(RapError, FileExistsError):
    """A record that is already there; records are written once."""


class RecordUnreadable(RapError, ValueError):
    """A record, a table of records or another kept result that is damaged, or holds something else."""


class RunUnreadable(RapError, ValueError):
    """A folder without a run's record, or a record from which its model or a mask can't be had again."""


class TraceUnreadable(RapError, ValueError):
    """A request trace of another form than expected.

    Args:
        path: Of the file.
        line: Number of the line, counted from 1.
        problem: What was expected, and what came.
    """

    def __init__(self, path: object, line: int, problem: str) -> None:
        self._arguments = path, line, problem
        super().__init__(f"{path}, line {line}: {problem}")

    def __reduce__(self) -> tuple:
        return type(self), self._arguments  # so that it crosses process borders


class InvalidTable(RapError, ValueError):
    """A table of measurements that can't be: numbers out of range, levels that are no ladder, masks measured twice."""


class FolderInUse(RapError, OSError):
    """A run's folder that another run is writing into."""


class InvalidConfig(RapError, ValueError):
    """A value in a run's config that no run can use: no whole number, too small, or an empty list of scenarios."""


class ExportRefused(RapError, ValueError):
    """A pruned model that a format can't hold, a folder that holds something, or files that do not compute the same."""


class SearchExhausted(RapError):
    """A token budget that is used up; searches end with the best found so far."""
