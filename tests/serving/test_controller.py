"""The controller: budgets are never passed, nothing is chased, and nobody's failure ends the service."""

import math

import numpy as np
import pytest

from rap_env.errors import InvalidConfig, InvalidWorkload
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint, smallest_bytes
from rap_env.memory.workload import Workload
from rap_env.policies import OrderPolicy
from rap_env.serving import Controller, Limits, RecordedMemory
from rap_env.serving.controller import _LowestOf

SHAPE = build_tiny_llm().shape
GREEDY = OrderPolicy(SHAPE, [component.name for component in SHAPE.components])
WORK = Workload(8, 512, 64)
DENSE = dense_bytes(SHAPE, WORK)
ACTIVATIONS = footprint(SHAPE, PruningMask.all_kept(SHAPE), WORK).activation_bytes
EXACT = Limits(margin=0.0, growth=0.0, window_seconds=0.0)


class Scene:
    """A clock and a budget that a test sets, relative to what the dense model needs with its activations."""

    def __init__(self, limits: Limits = EXACT, **deciders) -> None:
        self.seconds, self.share = 0.0, 1.0
        self.controller = Controller(
            SHAPE, deciders or {"greedy": GREEDY}, lambda: self.read(), lambda: self.seconds, limits
        )

    def read(self) -> float:
        return self.share * DENSE + ACTIVATIONS

    def decide(self, share: float, seconds: float = 1.0, workload: Workload = WORK):
        self.share, self.seconds = share, self.seconds + seconds
        return self.controller.decide(workload)


def needed(mask: PruningMask, workload: Workload) -> int:
    return footprint(SHAPE, mask, workload).total_bytes


def test_it_shrinks_at_once_and_grows_to_what_was_free_for_a_window():
    scene = Scene(Limits(margin=0.0, growth=0.0, window_seconds=3.0))
    dense = PruningMask.all_kept(SHAPE)
    assert scene.decide(1.0).mask == dense and scene.controller.switches == 0
    shrunk = scene.decide(0.7)
    assert shrunk.by == "greedy" and needed(shrunk.mask, WORK) <= scene.read()
    assert [scene.decide(1.0).mask for _ in range(2)] == [shrunk.mask] * 2
    assert scene.decide(1.0).mask == dense  # the reading of 0.7 is three seconds old
    assert scene.controller.switches == 2


def test_between_growing_and_shrinking_there_is_a_gap():
    scene = Scene(Limits(margin=0.0, growth=0.1, window_seconds=0.0))
    shrunk = scene.decide(0.7).mask
    assert all(scene.decide(share).mask == shrunk for share in (0.72, 0.7, 0.75, 0.7))
    assert scene.decide(2.0).mask == PruningMask.all_kept(SHAPE)


def test_no_budget_is_ever_passed_and_jitter_is_not_chased():
    generator = np.random.default_rng(0)
    scene = Scene(Limits(margin=0.02, growth=0.05, window_seconds=5.0))
    for _ in range(500):
        workload = Workload(int(generator.integers(1, 17)), int(generator.integers(1, 600)), 64)
        decision = scene.decide(float(generator.uniform(0.0, 1.5)), float(generator.exponential(0.5)), workload)
        if decision.mask is None:
            assert decision.needed_bytes > scene.read()
        else:
            part = Workload(decision.batch_size, workload.prompt_tokens, 64)
            assert 1 <= decision.batch_size <= workload.batch_size and needed(decision.mask, part) <= scene.read()
    scene = Scene(Limits(margin=0.02, growth=0.05, window_seconds=5.0))
    for _ in range(1000):
        scene.decide(0.75 + float(generator.uniform(-0.02, 0.02)), 0.1)
    assert scene.controller.switches <= 3


def test_steady_memory_means_no_switch_but_the_first():
    scene = Scene(Limits())
    masks = {scene.decide(0.8).mask for _ in range(100)}
    assert len(masks) == 1 and scene.controller.switches == 1


def test_a_batch_is_split_and_what_no_memory_holds_is_refused_with_what_would_do():
    scene = Scene(Limits(margin=0.1, growth=0.0, window_seconds=0.0))
    none_kept = smallest_bytes(SHAPE, WORK)
    scene.read = lambda: 0.0
    refused = scene.controller.decide(WORK)
    assert refused.mask is None and refused.batch_size == 0
    controller = Controller(SHAPE, {"greedy": GREEDY}, lambda: refused.needed_bytes, lambda: 0.0, Limits(0.1, 0.0, 0.0))
    served = controller.decide(WORK)
    assert served.batch_size == 1 and served.mask is not None
    one = footprint(SHAPE, PruningMask.all_kept(SHAPE), Workload(1, 512, 64)).activation_bytes
    assert refused.needed_bytes == math.ceil((none_kept + one) / 0.9)
    controller = Controller(SHAPE, {"greedy": GREEDY}, lambda: refused.needed_bytes - 1, lambda: 0.0, Limits(0.1, 0.0))
    assert controller.decide(WORK).mask is None


@pytest.mark.parametrize("reading", [math.nan, -1.0, math.inf, "memory", None, OSError("no such file")])
def test_a_reading_that_is_no_number_counts_as_the_lowest_of_the_window(reading):
    scene = Scene(Limits(margin=0.0, growth=0.0, window_seconds=10.0))
    shrunk = scene.decide(0.7).mask

    def broken() -> float:
        if isinstance(reading, Exception):
            raise reading
        return reading

    scene.controller._read = broken
    assert scene.decide(1.0).mask == shrunk and scene.controller.failures == {"reading": 1}
    fresh = Controller(SHAPE, {"greedy": GREEDY}, broken, lambda: 0.0)
    assert fresh.decide(WORK).mask is None


def test_deciders_that_fail_are_passed_over_and_counted():
    class Raises:
        def decide(self, workload, budget_bytes):
            raise RuntimeError("no idea")

    class Nonsense:
        def decide(self, workload, budget_bytes):
            return "everything"

    class TooMuch:
        def decide(self, workload, budget_bytes):
            return PruningMask.all_kept(SHAPE)

    scene = Scene(raises=Raises(), nonsense=Nonsense(), too_much=TooMuch(), greedy=GREEDY)
    decision = scene.decide(0.7)
    assert decision.by == "greedy" and needed(decision.mask, WORK) <= scene.read()
    failures = scene.controller.failures
    assert failures["raises"] and failures["nonsense"] and failures["too_much"] and not failures["greedy"]
    scene = Scene(raises=Raises())
    assert scene.decide(1.0).by == "held" and scene.decide(0.7).mask is None


def test_the_lowest_of_a_window_is_that_of_all_its_values():
    generator = np.random.default_rng(1)
    times = np.cumsum(generator.exponential(1.0, 300))
    values = generator.uniform(0.0, 1.0, 300)
    lowest = _LowestOf(4.0)
    for index, now in enumerate(times):
        lowest.add(now, values[index])
        begun = np.searchsorted(times, now - 4.0, side="right")
        assert lowest.value == values[begun : index + 1].min()


def test_what_is_asked_of_it_is_checked():
    with pytest.raises(InvalidConfig, match="at least one decider"):
        Controller(SHAPE, {}, lambda: 0.0, lambda: 0.0)
    with pytest.raises(InvalidConfig, match=r"growth: expected at least 0 and below 1; got 1\.5"):
        Limits(growth=1.5)
    with pytest.raises(InvalidWorkload):
        Scene().decide(1.0, workload=Workload(1, 10**6))
    with pytest.raises(InvalidConfig, match="got 2 times and 1 values"):
        RecordedMemory([0.0, 1.0], [5.0], lambda: 0.0)


def test_recorded_memory_is_read_at_its_time():
    now = [0.0]
    memory = RecordedMemory([1.0, 2.0, 4.0], [10.0, 20.0, 5.0], lambda: now[0])
    found = []
    for now[0] in (0.0, 1.0, 1.9, 2.0, 3.9, 4.0, 100.0):
        found.append(memory())
    assert found == [10.0, 10.0, 10.0, 20.0, 20.0, 5.0, 5.0]
