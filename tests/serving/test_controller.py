"""The controller: budgets are never passed, nothing is chased, and nobody's failure ends the service."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from rap_env.errors import InvalidConfig
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import activation_bytes, dense_bytes
from rap_env.memory.workload import Workload
from rap_env.policies import DensePolicy, OrderPolicy
from rap_env.serving import Controller, Limits, RecordedMemory
from rap_env.serving.controller import _Recent

SHAPE = build_tiny_llm().shape
GREEDY = OrderPolicy(SHAPE, [component.name for component in SHAPE.components])
WORK = Workload(8, 512, 64)
LENGTHS = [WORK.sequence_tokens] * WORK.batch_size
READ_TOKENS = 256
DENSE = dense_bytes(SHAPE, WORK)
ACTIVATIONS = activation_bytes(SHAPE, PruningMask.all_kept(SHAPE), READ_TOKENS, WORK.batch_size)
EXACT = Limits(margin=0.0, slack=0.0, window_seconds=0.0)


def controller(read, limits: Limits = EXACT, clock=lambda: 0.0, **deciders) -> Controller:
    return Controller(SHAPE, deciders or {"greedy": GREEDY}, read, clock, READ_TOKENS, limits)


class Scene:
    """A clock and a budget that a test sets, relative to what the dense model needs with its activations."""

    def __init__(self, limits: Limits = EXACT, **deciders) -> None:
        self.seconds, self.share = 0.0, 1.0
        self.controller = controller(lambda: self.read(), limits, lambda: self.seconds, **deciders)

    def read(self) -> float:
        return self.share * DENSE + ACTIVATIONS

    def decide(self, share: float, seconds: float = 1.0, lengths: Sequence[int] = LENGTHS, n_running: int = 0):
        self.share, self.seconds = share, self.seconds + seconds
        return self.controller.decide(lengths, n_running)


def needed(mask: PruningMask, lengths: Sequence[int] = LENGTHS) -> int:
    kept = SHAPE.fixed_bytes + mask.weight_bytes + mask.kv_bytes_per_token * sum(lengths)
    return kept + (activation_bytes(SHAPE, PruningMask.all_kept(SHAPE), READ_TOKENS, len(lengths)) if lengths else 0)


def test_it_shrinks_at_once_and_grows_to_what_was_free_for_a_window():
    scene = Scene(Limits(margin=0.0, slack=0.0, window_seconds=3.0))
    dense = PruningMask.all_kept(SHAPE)
    assert scene.decide(1.0).mask == dense and scene.controller.switches == 0
    shrunk = scene.decide(0.7)
    assert shrunk.by == "greedy" and needed(shrunk.mask) <= scene.read()
    assert [scene.decide(1.0).mask for _ in range(2)] == [shrunk.mask] * 2
    assert scene.decide(1.0).mask == dense  # the reading of 0.7 is three seconds old
    assert scene.controller.switches == 2


def test_it_does_not_grow_while_memory_falls_so_fast_that_it_had_to_shrink_again():
    scene = Scene(Limits(margin=0.0, slack=0.0, window_seconds=3.0))
    scene.decide(1.0)
    shrunk = scene.decide(0.5).mask
    shares = (1.25, 1.0, 0.75, 0.5)
    assert [scene.decide(share).mask for share in shares] == [shrunk] * 4
    steady = [scene.decide(0.7).mask for _ in range(6)]
    assert steady[-1] != shrunk and needed(steady[-1]) <= scene.read()


def test_it_does_not_grow_into_what_the_sequences_of_the_last_window_needed():
    scene = Scene(Limits(margin=0.0, slack=0.0, window_seconds=3.0))
    scene.decide(1.0)
    shrunk = scene.decide(0.6).mask
    for _ in range(3):  # between two bursts
        assert scene.decide(0.6, lengths=LENGTHS[:1]).mask == shrunk
        assert scene.decide(0.6).mask == shrunk
    for _ in range(4):
        alone = scene.decide(0.6, lengths=LENGTHS[:1]).mask
    assert needed(shrunk, LENGTHS[:1]) < needed(alone, LENGTHS[:1]) <= scene.read()


def test_between_growing_and_shrinking_there_is_a_gap():
    scene = Scene(Limits(margin=0.0, slack=0.1, window_seconds=0.0))
    shrunk = scene.decide(0.7).mask
    assert all(scene.decide(share).mask == shrunk for share in (0.72, 0.7, 0.75, 0.7))
    assert scene.decide(2.0).mask == PruningMask.all_kept(SHAPE)


def test_a_growth_that_gains_next_to_nothing_is_not_worth_a_switch():
    scene = Scene(Limits(margin=0.0, slack=0.05, window_seconds=0.0))
    scene.decide(0.7)
    grown = scene.decide(0.81).mask
    room = GREEDY.decide(WORK, int(0.95 * 0.82 * DENSE))
    assert 1.0 < needed(room) / needed(grown) < 1.05
    assert scene.decide(0.82).mask == grown
    scene.controller.applied(PruningMask.all_kept(SHAPE).drop(SHAPE.components[1].name))
    assert scene.decide(1.2).mask == PruningMask.all_kept(SHAPE)  # however little was missing


def test_no_budget_is_ever_passed_and_jitter_is_not_chased():
    generator = np.random.default_rng(0)
    scene = Scene(Limits(margin=0.02, slack=0.05, window_seconds=5.0))
    for _ in range(500):
        lengths = generator.integers(1, 600, generator.integers(0, 17)).tolist()
        n_running = int(generator.integers(0, len(lengths) + 1))
        share, seconds = float(generator.uniform(0.0, 1.5)), float(generator.exponential(0.5))
        decision = scene.decide(share, seconds, lengths, n_running)
        assert 0 <= decision.n_served <= len(lengths)
        if decision.mask is not None:
            assert needed(decision.mask, lengths[: decision.n_served]) <= scene.read()
        if decision.n_served == 0:
            assert decision.needed_bytes > scene.read() or not lengths
    scene = Scene(Limits(margin=0.02, slack=0.05, window_seconds=5.0))
    for _ in range(1000):
        scene.decide(0.75 + float(generator.uniform(-0.02, 0.02)), 0.1)
    assert scene.controller.switches <= 3


def test_memory_that_falls_on_does_not_mean_a_switch_each_time():
    scene = Scene(Limits(margin=0.0, slack=0.05, window_seconds=100.0))
    for share in np.linspace(1.0, 0.8, 400):
        scene.decide(float(share), 0.1)
    assert scene.controller.switches <= 5


def test_steady_memory_means_no_switch_but_the_first():
    scene = Scene(Limits())
    masks = {scene.decide(0.8).mask for _ in range(100)}
    assert len(masks) == 1 and scene.controller.switches == 1


def test_fewer_are_served_and_what_no_memory_holds_is_refused_with_what_would_do():
    limits = Limits(margin=0.1, slack=0.0, window_seconds=0.0)
    refused = controller(lambda: 0.0, limits).decide(LENGTHS, 0)
    assert refused.mask.kept == () and refused.n_served == 0  # as little as there can be
    assert controller(lambda: 0.0, limits, static=DensePolicy(SHAPE)).decide(LENGTHS, 0).mask is None
    served = controller(lambda: refused.needed_bytes, limits).decide(LENGTHS, 0)
    assert served.n_served >= 1 and served.mask is not None
    one = activation_bytes(SHAPE, PruningMask.all_kept(SHAPE), READ_TOKENS, 1)
    assert refused.needed_bytes == math.ceil((SHAPE.fixed_bytes + one) / 0.9)
    too_little = controller(lambda: refused.needed_bytes - 1, limits).decide(LENGTHS, 0)
    assert too_little.n_served == 0 and needed(too_little.mask, []) <= 0.9 * refused.needed_bytes
    assert too_little.needed_bytes == refused.needed_bytes


def test_those_in_flight_come_first_and_a_queue_prunes_no_deeper_than_it_may():
    dense_and_four = needed(PruningMask.all_kept(SHAPE), LENGTHS[:4])
    keeps_all = {"static": DensePolicy(SHAPE)}
    assert controller(lambda: dense_and_four, **keeps_all).decide(LENGTHS, 4).n_served == 4
    assert controller(lambda: dense_and_four, **keeps_all).decide(LENGTHS, 8).n_served == 4
    everyone = controller(lambda: dense_and_four).decide(LENGTHS, 4)
    assert everyone.n_served == 8 and everyone.mask != PruningMask.all_kept(SHAPE)
    floor = Limits(margin=0.0, slack=0.0, least_kept=0.99)
    assert controller(lambda: dense_and_four, floor).decide(LENGTHS, 4).n_served < 8
    assert controller(lambda: dense_and_four, floor).decide(LENGTHS, 8).n_served == 8  # they are in flight already


def test_without_sequences_the_weights_alone_have_to_fit():
    weights = needed(PruningMask.all_kept(SHAPE), [])
    assert controller(lambda: weights).decide([], 0).mask == PruningMask.all_kept(SHAPE)
    shrunk = controller(lambda: 0.9 * weights).decide([], 0)
    assert needed(shrunk.mask, []) <= 0.9 * weights and shrunk.n_served == 0


@pytest.mark.parametrize("reading", [math.nan, -1.0, math.inf, "memory", None, OSError("no such file")])
def test_a_reading_that_is_no_number_counts_as_the_lowest_of_the_window(reading):
    scene = Scene(Limits(margin=0.0, slack=0.0, window_seconds=10.0))
    shrunk = scene.decide(0.7).mask

    def broken() -> float:
        if isinstance(reading, Exception):
            raise reading
        return reading

    scene.controller._read = broken
    assert scene.decide(1.0).mask == shrunk and scene.controller.failures == {"reading": 1}
    assert controller(broken).decide(LENGTHS, 0).n_served == 0


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

    class Foreign:
        def decide(self, workload, budget_bytes):
            return PruningMask.all_kept(build_tiny_llm(n_layers=2).shape)

    scene = Scene(raises=Raises(), nonsense=Nonsense(), too_much=TooMuch(), foreign=Foreign(), greedy=GREEDY)
    decision = scene.decide(0.7)
    assert decision.by == "greedy" and needed(decision.mask) <= scene.read()
    failures = scene.controller.failures
    assert failures["raises"] and failures["nonsense"] and failures["too_much"] and failures["foreign"]
    assert not failures["greedy"]
    scene = Scene(raises=Raises())
    assert scene.decide(1.0).by == "held" and scene.decide(0.7).n_served < len(LENGTHS)  # with the mask that is there


def test_first_and_lowest_of_a_window_are_those_of_all_its_values():
    generator = np.random.default_rng(1)
    times = np.cumsum(generator.exponential(1.0, 300))
    values = generator.uniform(0.0, 1.0, 300)
    recent = _Recent(4.0)
    for index, now in enumerate(times):
        recent.add(now, values[index])
        begun = np.searchsorted(times, now - 4.0, side="right")
        assert recent.lowest == values[begun : index + 1].min() and recent.first == values[begun]


def test_what_is_asked_of_it_is_checked():
    with pytest.raises(InvalidConfig, match="at least one decider"):
        Controller(SHAPE, {}, lambda: 0.0, lambda: 0.0)
    with pytest.raises(InvalidConfig, match=r"slack: expected at least 0 and below 1; got 1\.5"):
        Limits(slack=1.5)
    with pytest.raises(InvalidConfig, match="got 2 times and 1 values"):
        RecordedMemory([0.0, 1.0], [5.0], lambda: 0.0)


def test_recorded_memory_is_read_at_its_time():
    now = [0.0]
    memory = RecordedMemory([1.0, 2.0, 4.0], [10.0, 20.0, 5.0], lambda: now[0])
    found = []
    for now[0] in (0.0, 1.0, 1.9, 2.0, 3.9, 4.0, 100.0):
        found.append(memory())
    assert found == [10.0, 10.0, 10.0, 20.0, 20.0, 5.0, 5.0]
