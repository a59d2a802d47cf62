"""The engine: answers are those of the model alone, whatever else runs, and nothing passes the memory that there is."""

import threading
from concurrent.futures import Future

import pytest
import torch

from rap_env.errors import InvalidConfig, InvalidWorkload, UnknownName, WeightsUnavailable
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.memory.footprint import activation_bytes
from rap_env.policies import DensePolicy, OrderPolicy
from rap_env.serving import Controller, Engine, Limits, Options, Request, Status

READ_TOKENS = 16
LIMITS = Limits(margin=0.0, slack=0.0, window_seconds=3.0)


class Scene:
    """An engine over a tiny model, with a clock and a budget that a test sets."""

    def __init__(self, limits: Limits = LIMITS, deciders=None, store_folder=None, **options) -> None:
        self.llm = build_tiny_llm()
        if store_folder is not None:
            WeightStore(self.llm, store_folder)
        shape = self.llm.shape
        self.seconds, self.budget_bytes, self.dense = 0.0, 10**9, PruningMask.all_kept(shape)
        order = OrderPolicy(shape, [component.name for component in reversed(shape.components)])
        self.model = LiveModel(self.llm)
        self.controller = Controller(
            shape, deciders or {"order": order}, lambda: self.budget_bytes, self.clock, READ_TOKENS, limits
        )
        self.engine = Engine(self.model, self.controller, Options(read_tokens=READ_TOKENS, **options), self.clock)

    def clock(self) -> float:
        return self.seconds

    def holding(self, tokens: int, share: float = 1.0, n_sequences: int = 1) -> float:
        """A budget for so many cached tokens beside a share of the weights."""
        activations = activation_bytes(self.llm.shape, self.dense, READ_TOKENS, n_sequences)
        return (
            self.llm.shape.fixed_bytes
            + share * self.dense.weight_bytes
            + self.dense.kv_bytes_per_token * tokens
            + activations
        )

    def run(self, steps: int | None = None) -> list:
        done = []
        while not self.engine.idle and (steps is None or len(done) < steps):
            self.seconds += 1.0
            done.append(self.engine.step())
            assert done[-1].needed_bytes <= self.budget_bytes or not done[-1].mask.kept or done[-1].by == "nobody"
        return done


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


@torch.inference_mode()
def alone(llm, request: Request, mask: PruningMask) -> list[int]:
    tokens = list(request.tokens)
    with llm.pruned(mask):
        for _ in range(request.generated_tokens):
            tokens.append(int(llm.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(request.tokens) :]


def requests(n: int = 8) -> list[Request]:
    return [Request(prompt(3 + 5 * index, index), 2 + index % 4) for index in range(n)]


def test_everyone_gets_the_answer_that_they_would_get_alone():
    scene = Scene(max_batch=3)
    sequences = [scene.engine.submit(request) for request in requests()]
    steps = scene.run()
    for sequence in sequences:
        assert sequence.status is Status.FINISHED and sequence.cache is None
        assert sequence.generated == alone(scene.llm, sequence.request, scene.dense)
        assert sequence.arrived_seconds <= sequence.first_seconds <= sequence.ended_seconds
    assert max(step.running for step in steps) <= 3 and max(step.read_tokens for step in steps) <= READ_TOKENS
    assert sum(step.generated_tokens for step in steps) == sum(request.generated_tokens for request in requests())


def test_a_sequence_that_generates_is_not_held_up_by_a_long_prompt():
    scene = Scene()
    first = scene.engine.submit(Request(prompt(4), 6))
    scene.run(1)
    scene.engine.submit(Request(prompt(90, 1), 1))
    scene.run(5)
    assert first.status is Status.FINISHED


def test_memory_that_falls_shrinks_the_model_before_anyone_is_let_in_and_evicts_the_last_to_come():
    """The policy can drop nothing, so that only giving caches up helps."""
    scene = Scene(deciders={"dense": DensePolicy(build_tiny_llm().shape)})
    first, last = (scene.engine.submit(Request(prompt(10, seed), 10)) for seed in (1, 2))
    scene.run(3)
    assert scene.engine.n_running == 2
    scene.budget_bytes = scene.holding(20)
    scene.run(2)
    assert scene.engine.n_running == 1 and last.status is Status.WAITING and last.evictions == 1 and last.cache is None
    scene.budget_bytes = 10**9
    scene.run()
    assert [one.generated for one in (first, last)] == [
        alone(scene.llm, one.request, scene.dense) for one in (first, last)
    ]


def test_a_mask_that_shrinks_in_flight_is_what_later_tokens_are_generated_with():
    scene = Scene()
    sequence = scene.engine.submit(Request(prompt(10), 12))
    scene.run(4)
    scene.budget_bytes = scene.holding(22, share=0.6)
    steps = scene.run(3)
    assert steps[0].switched and not steps[1].switched and steps[0].by == "order"
    kept = [mask.weight_bytes for mask in sequence.masks]
    assert kept[:4] == [scene.dense.weight_bytes] * 4 and max(kept[4:]) <= 0.6 * scene.dense.weight_bytes


@pytest.mark.parametrize("restoring", ["exact", "left out", "from now"])
def test_memory_that_returns_brings_weights_back_after_the_window(restoring, tmp_path):
    scene = Scene(store_folder=tmp_path, restoring=restoring)
    sequence = scene.engine.submit(Request(prompt(10), 30))
    scene.budget_bytes = scene.holding(40, share=0.5)
    scene.run(2)
    small = scene.engine.mask
    scene.budget_bytes = 10**9
    scene.run(2)
    assert scene.engine.mask == small != scene.dense
    for _ in range(200):  # the weights are read by another thread
        scene.run(1)
        if scene.engine.mask == scene.dense or scene.engine.idle:
            break
    assert scene.engine.mask == scene.dense and scene.llm.resident == scene.dense
    scene.run()
    assert sequence.status is Status.FINISHED and len(sequence.generated) == 30
    if restoring == "exact":
        again = Request((*sequence.request.tokens, *sequence.generated[:-4]), 4)
        assert sequence.generated[-4:] == alone(scene.llm, again, scene.dense)


def test_weights_that_cannot_be_read_do_not_end_the_service(tmp_path, monkeypatch):
    scene = Scene(store_folder=tmp_path)
    sequence = scene.engine.submit(Request(prompt(10), 20))
    scene.budget_bytes = scene.holding(40, share=0.5)
    scene.run(2)
    small = scene.engine.mask

    def missing(mask):
        raise WeightsUnavailable("the disk is gone")

    monkeypatch.setattr(scene.llm.store, "_read", missing)
    scene.budget_bytes = 10**9
    scene.run()
    scene.engine.step()  # what was still being read ends while nobody waits
    assert sequence.status is Status.FINISHED and scene.engine.mask == small == scene.controller.mask


def test_without_memory_requests_wait_for_a_while_and_are_refused_with_what_would_do():
    scene = Scene(patience_seconds=4.0)
    scene.budget_bytes = 0
    sequence = scene.engine.submit(Request(prompt(5), 5))
    scene.run(3)
    assert sequence.status is Status.WAITING
    scene.run()
    needed = scene.holding(0, share=0.0)
    assert sequence.status is Status.REFUSED and f"{needed:,.0f} bytes" in sequence.error
    scene.budget_bytes = needed
    served = scene.engine.submit(Request(prompt(5), 5))
    scene.run()
    assert served.status is Status.FINISHED and served.masks[0].weight_bytes == 0


def test_who_leaves_is_cancelled_and_whose_step_fails_is_told(monkeypatch):
    scene = Scene(max_batch=1)
    told = []
    running, waiting, other = (scene.engine.submit(request, told.append) for request in requests(3))
    scene.run(1)
    scene.engine.cancel(running)
    scene.engine.cancel(waiting)
    monkeypatch.setattr(scene.model, "read", lambda readings: 1 / 0)
    scene.run()
    assert [one.status for one in (running, waiting, other)] == [Status.CANCELLED, Status.CANCELLED, Status.FAILED]
    assert other.error == "ZeroDivisionError: division by zero" and {*told} == {running, waiting, other}
    monkeypatch.undo()
    after = scene.engine.submit(requests(1)[0], lambda sequence: 1 / 0)  # a listener that raises
    scene.run()
    assert after.status is Status.FINISHED


def test_stop_tokens_end_and_draws_follow_their_seed():
    scene = Scene()
    dense = alone(scene.llm, Request(prompt(6), 5), scene.dense)
    stopped = scene.engine.submit(Request(prompt(6), 5, stop_tokens=frozenset(dense[2:3])))
    drawn = [scene.engine.submit(Request(prompt(6), 20, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    nearly = scene.engine.submit(Request(prompt(6), 5, temperature=1.0, top_p=1e-9))
    scene.run()
    assert stopped.generated == dense[: dense.index(dense[2])] and stopped.status is Status.FINISHED
    assert drawn[0].generated == drawn[1].generated != drawn[2].generated
    assert nearly.generated == dense


def test_a_given_answer_is_scored_as_a_forward_scores_it():
    scene = Scene()
    answer = prompt(7, 5)
    sequence = scene.engine.submit(Request(prompt(20), 7, answer=answer))
    scene.run()
    with torch.inference_mode():
        logits = scene.llm.model(torch.tensor([[*prompt(20), *answer]])).logits[0, 19:-1].log_softmax(-1)
    expected = logits[torch.arange(7), torch.tensor(answer)].tolist()
    assert sequence.generated == list(answer) and sequence.log_likelihoods == pytest.approx(expected, abs=1e-4)


def test_other_threads_may_submit_while_it_serves():
    scene = Scene()
    sequences: list = []
    threads = [
        threading.Thread(target=lambda: sequences.extend(scene.engine.submit(r) for r in requests(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while len(sequences) < 20 or not scene.engine.idle:
        scene.run()
    assert {one.status for one in sequences} == {Status.FINISHED}


def test_what_cannot_be_served_is_refused_at_once():
    scene = Scene()
    context = scene.llm.shape.context_tokens
    with pytest.raises(InvalidWorkload, match=f"expected at most {context:,} tokens"):
        scene.engine.submit(Request(prompt(5), context))
    with pytest.raises(InvalidWorkload, match="expected tokens of 0 to 256"):
        scene.engine.submit(Request((1, 257), 1))
    for wrong in (
        {"tokens": ()},
        {"generated_tokens": 0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"answer": ()},
    ):
        with pytest.raises(InvalidWorkload):
            Request(**{"tokens": (1,), "generated_tokens": 1} | wrong)
    with pytest.raises(UnknownName, match="way of restoring"):
        Options(restoring="by magic")
    with pytest.raises(InvalidConfig, match="the same of controller and options; got 16 and 512"):
        Engine(scene.model, scene.controller)
    with pytest.raises(InvalidConfig, match="max_batch"):
        Options(max_batch=0)


def test_weights_that_are_being_read_count_as_taken_and_go_when_nobody_wants_them_any_more(tmp_path, monkeypatch):
    """Otherwise a process that measures itself would take them for something else, and shrink for it."""
    scene = Scene(store_folder=tmp_path)
    scene.engine.submit(Request(prompt(10), 40))
    scene.budget_bytes = scene.holding(50, share=0.5)
    scene.run(2)
    small, reading, released = scene.engine.needed_bytes, Future(), []
    store = scene.llm.store
    release = store.release
    monkeypatch.setattr(store, "prefetch", lambda mask: reading)
    monkeypatch.setattr(store, "release", lambda kept: (released.append(kept), release(kept)))
    scene.budget_bytes = 10**9
    scene.run(6)
    grown = scene.engine.needed_bytes
    assert (
        scene.engine.mask != scene.dense and grown == small - scene.engine.mask.weight_bytes + scene.dense.weight_bytes
    )
    reading.set_result(None)
    scene.budget_bytes = scene.holding(50, share=0.5)
    scene.run(1)
    assert released and scene.engine.needed_bytes <= small
