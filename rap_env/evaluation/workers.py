"""Workers: Ray actors that each hold a model and evaluate masks, replaced when they die."""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from rap_env.errors import InvalidConfig, WorkersFailed
from rap_env.evaluation.actor import EvaluationActor, model_identity
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

_QUEUED = 2  # batches that a worker is given at once: it begins the next one while the last one's results travel
_OBJECT_STORE_BYTES = 10**8  # of a Ray that is started here; only evaluators lie there


class _Slot:
    """The place of one worker: who works there now, and what was asked of it, the oldest first.

    An entry is a Ray reference with the masks that it will bring evaluations of; without masks, the worker's identity.
    """

    def __init__(self) -> None:
        self.actor: Any = None
        self.asked: deque[tuple[Any, list[PruningMask]]] = deque()
        self.is_ready = False


class Workers:
    """Ray actors with a model each. They start with the first masks, and end with this object.

    A worker runs with as many threads as this process, since their number is part of a result's key: for two workers on
    two cores start with `OMP_NUM_THREADS=1`. Every worker's model, engine and platform have to equal the driver's.

    Args:
        load: Loads the model, as the driver's was; called in every worker. It travels by pickle.
        n_workers: How many there are.
        batch_masks: Masks that a worker is given at once, at most: evaluated together they share work, and few balance
            better. Of few masks every worker gets at least two batches.
        num_gpus: Cards of each worker; 0 for workers on CPUs.
        address: Of a Ray cluster (`auto`, `ray://host:10001`); None is $RAY_ADDRESS, or a Ray of this machine alone.
        max_deaths: A mask that this many workers died of is an error, and so is as many in a row that died before they
            had loaded their model.
        start_seconds: Without any worker for so long it is an error.

    Raises:
        InvalidConfig: A number that no pool can have.
    """

    def __init__(  # noqa: PLR0913 - its arguments are the keys of a YAML
        self,
        load: Callable[[], SwitchableLLM],
        n_workers: int = 2,
        batch_masks: int = 4,
        num_gpus: float = 0,
        address: str | None = None,
        max_deaths: int = 3,
        start_seconds: float = 600.0,
    ) -> None:
        for name, value in {"n_workers": n_workers, "batch_masks": batch_masks, "max_deaths": max_deaths}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidConfig(f"workers.{name}: expected a whole number of at least 1; got {value!r}")
        self._load, self._batch_masks, self._num_gpus = load, batch_masks, num_gpus
        self._address, self._max_deaths, self._start_seconds = address, max_deaths, start_seconds
        self._slots = [_Slot() for _ in range(n_workers)]
        self._sent: dict[int, tuple[Evaluator, Any]] = {}  # by id: the evaluator, kept alive, and its reference in Ray
        self._deaths: Counter[PruningMask] = Counter()
        self._deaths_at_start = 0
        self._ray: ModuleType | None = None
        self._identity: Mapping[str, Any] = {}

    def evaluate_many(
        self, evaluator: Evaluator, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        """As `Evaluator.evaluate_many`, with several batches in flight; what a dead worker had begun is done again.

        Args:
            evaluator: What evaluates, in the workers.
            llm: The driver's model.
            masks: Distinct masks.
            near: See there.

        Raises:
            WorkersFailed: Ray is missing or no worker starts, a worker's model is not the driver's, or a mask has ended
                `max_deaths` of them.
            Exception: What was raised in a worker.
        """
        self._start(llm)
        waiting = deque(batches(masks, len(self._slots), self._batch_masks))
        try:
            while waiting or any(asked for slot in self._slots for _reference, asked in slot.asked):
                for slot in sorted(self._slots, key=lambda slot: len(slot.asked)):
                    while waiting and slot.is_ready and len(slot.asked) < _QUEUED:
                        batch = waiting.popleft()
                        slot.asked.append((self._ask(slot, evaluator, batch, near), batch))
                slot = self._next_answer()
                reference, batch = slot.asked[0]
                try:
                    answer = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    slot.asked.popleft()
                    if not batch:
                        slot.actor = None  # it could not load its model
                    raise error.cause from None
                except self._ray.exceptions.RayActorError as error:
                    waiting.extendleft(reversed(self._replace(slot, error)))
                    continue
                slot.asked.popleft()
                if batch:
                    yield from zip(batch, answer, strict=True)
                else:
                    self._admit(slot, answer)
        finally:
            self._abandon()

    def close(self) -> None:
        """Ends the workers; later use starts others."""
        for slot in self._slots:
            slot.actor, slot.is_ready = None, False  # Ray ends an actor that nobody refers to
            slot.asked.clear()

    def _start(self, llm: SwitchableLLM) -> None:
        """Fills the vacant places: at first all of them."""
        identity = model_identity(llm)
        if self._ray is None:
            cpus = len(self._slots) * self._cpus()
            self._ray, self._identity = _connected(self._address, cpus, self._num_gpus), identity
        elif identity != self._identity:
            raise WorkersFailed(f"the workers were started for another model: {_differences(identity, self._identity)}")
        for slot in self._slots:
            if slot.actor is None:
                self._hire(slot)

    def _cpus(self) -> int:
        return 1 if self._num_gpus else torch.get_num_threads()

    def _hire(self, slot: _Slot) -> None:
        """Starts a worker; the first answer that it owes is its identity."""
        threads = torch.get_num_threads()
        variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
        options = {"num_cpus": self._cpus(), "num_gpus": self._num_gpus, "runtime_env": {"env_vars": variables}}
        slot.actor = self._ray.remote(EvaluationActor).options(**options).remote(threads)
        slot.is_ready = False
        slot.asked = deque([(slot.actor.load.remote(self._load), [])])

    def _admit(self, slot: _Slot, identity: Mapping[str, Any]) -> None:
        if identity != self._identity:
            slot.actor = None
            raise WorkersFailed(
                "a worker would not get the results of this process: " + _differences(self._identity, identity)
            )
        slot.is_ready, self._deaths_at_start = True, 0

    def _ask(self, slot: _Slot, evaluator: Evaluator, batch: list[PruningMask], near: PruningMask | None) -> Any:
        if id(evaluator) not in self._sent:
            self._sent[id(evaluator)] = evaluator, self._ray.put(evaluator)
        reference = self._sent[id(evaluator)][1]
        keeps = [mask.keep for mask in batch]  # the rows of costs are there already
        return slot.actor.evaluate.remote([reference], keeps, None if near is None else near.keep)

    def _next_answer(self) -> _Slot:
        """The place whose oldest question is answered next, or that has lost its worker."""
        by_reference = {slot.asked[0][0]: slot for slot in self._slots if slot.asked}
        patience = None if any(slot.is_ready for slot in self._slots) else self._start_seconds
        done, _ = self._ray.wait(list(by_reference), num_returns=1, timeout=patience)
        if not done:
            raise WorkersFailed(
                f"no worker of {self._cpus()} CPUs and {self._num_gpus} GPUs has started within"
                f" {self._start_seconds:.0f} s; free in the cluster are {self._ray.available_resources()}"
            )
        return by_reference[done[0]]

    def _replace(self, slot: _Slot, error: Exception) -> list[list[PruningMask]]:
        """Puts another worker in a dead one's place, and returns the batches that it has left.

        Of the one that was running each mask becomes a batch of its own: the one that ends workers does so alone then.
        """
        (_reference, running), *others = slot.asked
        slot.actor, slot.is_ready = None, False
        slot.asked.clear()
        self._deaths.update(running)
        self._deaths_at_start += not running
        if self._deaths_at_start >= self._max_deaths:
            raise WorkersFailed(f"{self._deaths_at_start} workers in a row died while they loaded the model: {error}")
        for mask in running:
            if self._deaths[mask] >= self._max_deaths:
                names = ", ".join(component.name for component in mask.dropped) or "nothing"
                raise WorkersFailed(
                    f"{self._deaths[mask]} workers died while they evaluated the mask that drops {names}; what is"
                    f" finished is kept. Is their memory too small? Ray says: {error}"
                )
        self._hire(slot)
        return [[mask] for mask in running] + [batch for _reference, batch in others]

    def _abandon(self) -> None:
        """Forgets questions whose answers nobody waits for any more; a worker that starts goes on starting."""
        for slot in self._slots:
            for reference, _batch in (entry for entry in slot.asked if entry[1]):
                self._ray.cancel(reference)
            slot.asked = deque(entry for entry in slot.asked if not entry[1])


def batches(masks: Sequence[PruningMask], n_workers: int, batch_masks: int) -> list[list[PruningMask]]:
    """Cuts masks into runs of equal size; those that begin alike stand together, for they share the work of it.

    Args:
        masks: Distinct masks.
        n_workers: Each gets at least two runs, if there are as many masks.
        batch_masks: Masks of a run, at most.
    """
    size = max(1, min(batch_masks, math.ceil(len(masks) / (2 * n_workers))))
    ordered = sorted(masks, key=lambda mask: mask.keep)
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    named = [
        f"{name} ({ours.get(name)} in this process, {theirs.get(name)} in the worker)"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return "; ".join(named)


def _connected(address: str | None, cpus: int, gpus: float) -> ModuleType:
    """Ray, connected to a cluster or started here.

    Raises:
        WorkersFailed: It is not installed, can't be reached, or a Ray of this machine has too few cores.
    """
    try:
        import ray
    except ImportError as error:
        raise WorkersFailed(f"workers need Ray: pip install 'rap-env[ray]' ({error})") from error
    if ray.is_initialized():  # by whoever runs this process, as Hydra's launcher
        return ray
    is_local = address is None and not os.environ.get("RAY_ADDRESS")
    options = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False} if is_local else {}
    try:
        ray.init(address=address, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkersFailed(f"Ray at {address or os.environ.get('RAY_ADDRESS') or 'this machine'}: {error}") from error
    there = ray.cluster_resources().get("CPU", 0)
    if is_local and not gpus and cpus > there:
        ray.shutdown()
        raise WorkersFailed(
            f"expected cores for all workers; they need {cpus} with OMP_NUM_THREADS={torch.get_num_threads()}, and Ray"
            f" has {there:.0f}"
        )
    return ray
