"""Puts together what serves a model: its weight store, controller, engine, thread and metrics."""

import time
from collections.abc import Callable, Mapping

from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.serving.coarse import CoarseWidths
from rap_env.serving.controller import Controller, Decider, Limits
from rap_env.serving.engine import Engine, Options
from rap_env.serving.metrics import Metrics
from rap_env.serving.readings import RealMemory
from rap_env.serving.service import Service

_LONG_TOKENS = 2048  # of the sequence that is read beforehand; a longer one would take memory for nothing


def assemble(
    llm: SwitchableLLM,
    deciders: Mapping[str, Decider],
    budget: Callable[[], float] | int,
    options: Options | None = None,
    limits: Limits | None = None,
    max_waiting: int = 64,
) -> tuple[Service, Metrics]:
    """A service that is not started yet, and what it counts with; widths are coarse (`CoarseWidths`) and warmed up.

    On a CPU the weights move into a store, unless they are in one, so that what is dropped leaves memory. Elsewhere
    masks only save KV cache and time.

    Args:
        llm: The model; nothing else may apply masks to it.
        deciders: As for `Controller`; their masks keep first parts of sites.
        budget: Tells the bytes that the model may take; or bytes that are to stay free of what the machine has.
        options: How to serve.
        limits: Against switching to and fro.
        max_waiting: Sequences that may wait at a time.

    Raises:
        UnsupportedArchitecture: The model's attention has a sliding window.
        WeightsUnavailable: The store's file can't be written.
        InvalidConfig: A number is out of its range.
    """
    options = options or Options()
    if llm.store is None and llm.device.type == "cpu":
        WeightStore(llm)
    shape, mapped, model = llm.shape, llm.store is not None, LiveModel(llm)
    coarse = {name: CoarseWidths(decider, shape) for name, decider in deciders.items()}
    levels = next(iter(coarse.values())).levels() if coarse else []
    model.warm_up(options.read_tokens, levels, min(shape.context_tokens, _LONG_TOKENS))

    def held() -> int:
        return (shape.fixed_bytes if mapped else shape.weight_bytes) + service.cache_bytes

    read = budget if callable(budget) else RealMemory(held, budget, llm.device)
    controller = Controller(shape, coarse, read, time.monotonic, options.read_tokens, limits)
    metrics = Metrics(shape.weight_bytes - shape.fixed_bytes, controller.failures)
    service = Service(Engine(model, controller, options), metrics, max_waiting)
    return service, metrics
