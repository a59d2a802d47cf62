"""The service's thread, without HTTP: what it tells, and when it lets go."""

import time

import pytest

from rap_env.errors import InvalidConfig
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_tiny_llm
from rap_env.policies import OrderPolicy, even_order
from rap_env.serving import Controller, Engine, Limits, Options, Request, Service, Status
from rap_env.serving.service import Progress, ServiceStopped, TooManyWaiting
from tests.serving.endpoint_cases import PLENTY, Budget, until


class Scene:
    """An engine with a clock and a budget that a test sets, and what was told about its sequences."""

    def __init__(self, **options) -> None:
        self.seconds, self.budget, self.told = 0.0, Budget(), list[tuple[int, Progress]]()
        model = LiveModel(build_tiny_llm(seed=3))
        self.shape = model.llm.shape
        decider = {"even": OrderPolicy(self.shape, even_order(self.shape))}
        controller = Controller(self.shape, decider, self.budget, lambda: self.seconds, 64, Limits())
        self.engine = Engine(model, controller, Options(read_tokens=64, **options), lambda: self.seconds)
        self.service = Service(self.engine, max_waiting=2)

    def tell(self, number: int, progress: Progress) -> None:
        self.told.append((number, progress))


def test_each_token_is_told_once_and_the_end_last():
    scene = Scene()
    scene.service.start()
    scene.service.submit([Request((5, 6), 4), Request((7,), 3)], scene.tell)
    until(lambda: scene.service.n_open == 0 and scene.engine.idle)
    scene.service.close()
    for number, n_tokens in ((0, 4), (1, 3)):
        news = [progress for own, progress in scene.told if own == number]
        assert [len(progress.tokens) for progress in news] == [1] * n_tokens
        assert [progress.status for progress in news] == [Status.RUNNING] * (n_tokens - 1) + [Status.FINISHED]


def test_only_so_many_wait_and_nobody_is_taken_in_before_the_start_or_after_the_end():
    scene = Scene()
    with pytest.raises(ServiceStopped):
        scene.service.submit([Request((5,), 1)], scene.tell)
    scene.service.start()
    with pytest.raises(TooManyWaiting, match="at most 2 waiting requests; got 3 beside 0"):
        scene.service.submit([Request((5,), 1)] * 3, scene.tell)
    scene.service.submit([Request((5,), 8000)], scene.tell)
    scene.service.close()
    assert scene.told[-1] == (0, Progress((), Status.FAILED, "the engine has ended"))
    with pytest.raises(ServiceStopped):
        scene.service.submit([Request((5,), 1)], scene.tell)
    with pytest.raises(InvalidConfig, match="max_waiting: expected at least 1; got 0"):
        Service(scene.engine, max_waiting=0)


def test_a_listener_that_raises_does_not_end_the_thread():
    scene = Scene()
    scene.service.start()

    def broken(_number, _progress):
        raise RuntimeError("the event loop is closed")

    scene.service.submit([Request((5,), 2)], broken)
    scene.service.submit([Request((5,), 2)], scene.tell)
    until(lambda: len(scene.told) == 2)
    assert scene.service.alive and scene.service.n_open == 0
    scene.service.close()


def test_caches_take_what_was_written_to_them():
    scene = Scene()
    scene.service.start()
    (sequence,) = scene.service.submit([Request(tuple(range(50)), 8000)], scene.tell)
    until(lambda: len(sequence.generated) > 10)
    bytes_per_token = sum(component.kv_bytes_per_token for component in scene.shape.components)
    assert 50 * bytes_per_token < scene.service.cache_bytes < 8000 * bytes_per_token
    scene.service.cancel(sequence)
    until(lambda: scene.service.n_open == 0)
    assert scene.service.cache_bytes == 0
    scene.service.close()


def test_patience_begins_when_memory_is_short_not_with_the_request():
    scene = Scene(patience_seconds=10.0)
    sequence = scene.engine.submit(Request((5, 6), 1000))
    scene.engine.step()
    scene.seconds, scene.budget.n_bytes = 100.0, 0.0
    scene.engine.step()
    assert sequence.status is Status.WAITING and sequence.evictions == 1
    scene.seconds, scene.budget.n_bytes = 109.0, PLENTY
    scene.engine.step()
    assert sequence.status is Status.RUNNING
    scene.seconds, scene.budget.n_bytes = 200.0, 0.0
    scene.engine.step()
    scene.seconds = 209.9
    scene.engine.step()
    assert sequence.status is Status.WAITING
    scene.seconds = 210.0
    scene.engine.step()
    assert sequence.status is Status.REFUSED and "not enough memory: at least" in sequence.error


def test_while_idle_it_steps_about_ten_times_a_second():
    scene = Scene()
    count, step = [0], scene.engine.step

    def counting():
        count[0] += 1
        return step()

    scene.engine.step = counting
    scene.service.start()
    time.sleep(1.0)
    scene.service.close()
    assert 4 <= count[0] <= 13
