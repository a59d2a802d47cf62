"""What the tests of workers share: evaluators that end who runs them, and a Ray that runs in the calling process."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rap_env.errors import ModelUnavailable
from rap_env.evaluation.perplexity import PerplexityEvaluator

DEADLY = "layer0.mlp"  # the mask that drops this one alone
WINDOWS = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))


class Death(BaseException):
    """Ends an actor of `FakeRay`."""


def die() -> None:
    raise Death


class DeadlyEvaluator(PerplexityEvaluator):
    """Ends who runs it at one mask as often as it is told, and writes a line for each mask that it measures.

    Args:
        folder: Where it writes `measured`, and finds as many files `life*` as shall end.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(WINDOWS, "deadly")
        self._folder = folder

    def evaluate_many(self, llm, masks, near=None):
        for mask in masks:
            if [component.name for component in mask.dropped] == [DEADLY]:
                for life in self._folder.glob("life*"):
                    life.unlink()
                    die()
        for mask, evaluation in super().evaluate_many(llm, masks, near):
            with open(self._folder / "measured", "a") as file:
                file.write(f"{os.getpid()} {mask.digest}\n")
            time.sleep(0.01)
            yield mask, evaluation


class FailingEvaluator(PerplexityEvaluator):
    """Raises what evaluators raise."""

    def __init__(self) -> None:
        super().__init__(WINDOWS, "failing")

    def evaluate_many(self, llm, masks, near=None):
        raise ModelUnavailable("the weights are gone")


class FakeRay:
    """As much of Ray as workers use, in this process: what is asked runs when its answer is wanted.

    Attributes:
        started: Actors that were started.
        has_room: Whether anything is ever done.
    """

    class exceptions:
        class RayTaskError(Exception):
            @property
            def cause(self):
                return self.args[0]

        class RayActorError(Exception):
            pass

    def __init__(self) -> None:
        self.started, self.has_room = 0, True

    def is_initialized(self) -> bool:
        return True

    def init(self, **_options) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def available_resources(self) -> dict:
        return {"CPU": 2.0}

    def remote(self, actor_class: type) -> "_Options":
        return _Options(self, actor_class)

    def put(self, value: object) -> "_Reference":
        return _Reference(lambda: value)

    def get(self, reference: "_Reference") -> object:
        return reference.answer()

    def wait(self, references, num_returns: int, timeout: float | None = None):
        return (references[-1:], references[:-1]) if self.has_room else ([], references)

    def cancel(self, reference: "_Reference") -> None:
        reference.answer = None


class _Reference:
    numbers = itertools.count()

    def __init__(self, answer: Callable) -> None:
        self.answer, self._number = answer, next(self.numbers)

    def hex(self) -> str:
        return str(self._number)


class _Options:
    def __init__(self, ray: FakeRay, actor_class: type) -> None:
        self._ray, self._class = ray, actor_class

    def options(self, **_options) -> "_Options":
        return self

    def remote(self, *arguments) -> "_Actor":
        self._ray.started += 1
        return _Actor(self._class(*arguments))


class _Actor:
    """An actor's handle: every method has a `remote`."""

    def __init__(self, actor: object) -> None:
        self._actor, self._is_dead = actor, False

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self, method)

    def run(self, method: str, arguments: tuple) -> object:
        if self._is_dead:
            raise FakeRay.exceptions.RayActorError("it died before")
        try:
            return getattr(self._actor, method)(*arguments)
        except Death:
            self._is_dead = True
            raise FakeRay.exceptions.RayActorError("it died") from None
        except Exception as error:
            raise FakeRay.exceptions.RayTaskError(error) from None


class _Method:
    def __init__(self, actor: _Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments) -> _Reference:
        return _Reference(lambda: self._actor.run(self._name, arguments))
