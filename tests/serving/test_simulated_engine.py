"""The simulated queue does what the engine does, step by step."""

import pytest

from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import activation_bytes
from rap_env.serving import Controller, Engine, Limits, Options, Request
from rap_env.serving.episodes import Episode
from rap_env.serving.jobs import Targets
from rap_env.serving.memory_traces import MemoryTrace
from rap_env.serving.simulated import Simulation
from rap_env.serving.tables import Level, ServingTable
from rap_env.serving.traces import Arrival

MAX_BATCH, READ_TOKENS, STEP_SECONDS = 3, 32, 1.0
REQUESTS = ((40, 5), (10, 9), (25, 1), (7, 4), (60, 6))  # prompt and generated tokens


class KeepsAll:
    """A decider that has one mask."""

    def __init__(self, shape) -> None:
        self._mask = PruningMask.all_kept(shape)

    def decide(self, workload, budget_bytes) -> PruningMask:
        return self._mask


def table_of(shape) -> ServingTable:
    """The dense model in steps of a second each, and a level of the same bytes but one that nobody asks for."""
    mask = PruningMask.all_kept(shape)
    seconds = {
        "base_seconds": STEP_SECONDS,
        "prompt_token_seconds": 0.0,
        "sequence_seconds": 0.0,
        "switch_seconds": 0.0,
    }
    rows = [
        Level(name, share, mask.weight_bytes - less, mask.kv_bytes_per_token, 0.0, **seconds)
        for name, share, less in (("dense", 1.0, 0), ("other", 0.9, 1))
    ]
    fixed = {"cached_token_seconds": 0.0, "byte_down_seconds": 0.0, "byte_up_seconds": 0.0, "measured": {}}
    activations = activation_bytes(shape, mask, READ_TOKENS, MAX_BATCH)
    return ServingTable(tuple(rows), shape.fixed_bytes, activations, MAX_BATCH, READ_TOKENS, **fixed)


@pytest.mark.parametrize("falls", [False, True])
def test_steps_of_both_are_the_same(falls):
    llm = build_tiny_llm(n_layers=2)
    table = table_of(llm.shape)
    plenty = 2 * table.needed_bytes(0, 200)
    scarce = table.needed_bytes(0, 50) if falls else plenty  # two of the requests need 64 tokens
    now = [0.0]

    def budget() -> float:
        return scarce if 2.5 <= now[0] < 5.5 else plenty

    limits = Limits(margin=0.0, slack=0.0, window_seconds=0.0)
    controller = Controller(llm.shape, {"dense": KeepsAll(llm.shape)}, budget, lambda: now[0], READ_TOKENS, limits)
    options = Options(MAX_BATCH, READ_TOKENS, patience_seconds=100.0)
    engine = Engine(LiveModel(llm), controller, options, clock=lambda: now[0])
    for prompt, generated in REQUESTS:
        engine.submit(Request(tuple([1] * prompt), generated))
    memory = MemoryTrace((0.0, 2.5, 5.5), (1.0, scarce / plenty, 1.0))
    arrivals = tuple(Arrival(0.0, *tokens) for tokens in REQUESTS)
    one = Simulation(table, Episode(arrivals, memory, 100.0), plenty, Targets(100.0, 100.0, 100.0))
    n_evicted = 0
    for n_steps in range(1, 40):
        before = one.counts.generated_tokens
        step = engine.step()
        one.advance(0, now[0] + 0.5)
        now[0] += STEP_SECONDS
        found = (one.counts.generated_tokens - before, one.n_running, len(one.waiting))
        assert found == (step.generated_tokens, step.running, step.waiting), f"step {n_steps}"
        n_evicted = max(n_evicted, one.counts.evictions)
        if engine.idle:
            break
    assert engine.idle and one.counts.served == len(REQUESTS) and (n_evicted > 0) == falls
