"""Evaluations that several processes want at once are measured by one of them, and the others wait for its results."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from rap_env.errors import RapError
from rap_env.evaluation.owners import LEASE_SECONDS
from rap_env.evaluation.store import ResultStore

RENEW_SECONDS = LEASE_SECONDS / 10  # between signs of life to other hosts, however long one evaluation takes
POLL_SECONDS = (0.05, 1.0)  # first and longest pause

Measure = Callable[[list[int]], Iterator[tuple[int, dict]]]


def measured_once(
    store: ResultStore | None, identities: Sequence[Mapping], measure: Measure
) -> tuple[list[dict], list[int]]:
    """The results of all identities: taken from the store, measured here, or waited for while others measure them.

    Everything that is claimed here is measured before anything is waited for, so no two processes wait for each other.

    Args:
        store: Where results and claims are kept; None measures everything.
        identities: Distinct full identities.
        measure: Is given indices into `identities` and yields (index, result) for each as soon as it is finished.

    Returns:
        The results in the order of the identities, and the indices that were measured here in the order of finishing.

    Raises:
        StoreDamaged, StoreUnavailable: As of `ResultStore`.
        Exception: Whatever `measure` raises; what it yielded before is stored, and others may measure the rest.
    """
    if store is None:
        found = dict(measure(list(range(len(identities)))))
        return [found[index] for index in range(len(identities))], list(found)
    found: dict[int, dict] = {}
    measured: list[int] = []
    pause, longest_pause = POLL_SECONDS
    while True:
        missing = [index for index in range(len(identities)) if index not in found]
        stored = zip(missing, store.get_many([identities[index] for index in missing]), strict=True)
        known = {index: result for index, result in stored if result is not None}
        found |= known
        if not (missing := [index for index in missing if index not in found]):
            return [found[index] for index in range(len(identities))], measured
        is_ours = store.claim([identities[index] for index in missing])
        if claimed := list(itertools.compress(missing, is_ours)):
            found |= (fresh := _measure_claimed(store, identities, claimed, measure))
            measured += fresh
        elif not known:
            time.sleep(pause)
            pause = min(2 * pause, longest_pause)


def _measure_claimed(
    store: ResultStore, identities: Sequence[Mapping], claimed: list[int], measure: Measure
) -> dict[int, dict]:
    finished: dict[int, dict] = {}
    try:
        with _renewed(store):
            for index, result in measure(claimed):
                store.put(identities[index], result)
                finished[index] = result
        assert finished.keys() == set(claimed), f"measured {sorted(finished)} of {claimed}"
    except BaseException:
        with contextlib.suppress(RapError):  # the store may be what failed, and its error is on its way already
            store.release([identities[index] for index in claimed if index not in finished])
        raise
    return finished


@contextlib.contextmanager
def _renewed(store: ResultStore) -> Iterator[None]:
    """Renews this process's claims while the body runs, from a thread of its own."""
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(RENEW_SECONDS):
            with contextlib.suppress(RapError):  # the next result to be stored says what is wrong, or it has passed
                store.renew()

    thread = threading.Thread(target=renew, name="claims", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
