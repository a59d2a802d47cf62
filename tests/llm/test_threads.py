"""Threads share one model: what each gets is what it would get alone."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.packing import TokenTree
from rap_env.llm.switchable import SwitchableLLM

PROMPT = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
TREES = [TokenTree((1, 2, 3)), TokenTree((4, 5), ((6,), (7, 8)))]
SECONDS = 30


@pytest.fixture(params=["llama", "opt", "qwen2", "mistral"])
def llm(request) -> SwitchableLLM:
    return build_tiny_llm(request.param)


@pytest.fixture
def other_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        yield pool


def decoder_of(llm: SwitchableLLM) -> torch.nn.Module:
    return llm.model.model.decoder if llm.shape.model_type == "opt" else llm.model.model


class Pause:
    """Stops the other thread where it calls a module, until `end` is called."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._reached, self._ended = threading.Event(), threading.Event()
        self._handle = module.register_forward_pre_hook(self._stop)

    def _stop(self, *_arguments) -> None:
        if threading.current_thread().name.startswith("other"):
            self._reached.set()
            assert self._ended.wait(SECONDS)

    def wait(self) -> None:
        assert self._reached.wait(SECONDS)

    def end(self) -> None:
        self._ended.set()
        self._handle.remove()


@torch.inference_mode()
def packed(llm: SwitchableLLM) -> torch.Tensor:
    return llm.run(llm.shape.sites, *llm.open_packed(TREES)[:2])


@torch.inference_mode()
def opened(llm: SwitchableLLM) -> torch.Tensor:
    return llm.logits(llm.run(llm.shape.sites, *llm.open_stream(PROMPT["input_ids"])))


def generated(llm: SwitchableLLM) -> torch.Tensor:
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 256}
    return llm.model.generate(**PROMPT, **options)


def test_generation_while_a_packed_stream_is_half_way_is_as_alone_for_no_config_of_the_model_is_flipped(
    llm, other_thread
):
    expected, expected_packed = generated(llm), packed(llm)
    pause = Pause(decoder_of(llm).layers[2].self_attn)
    running = other_thread.submit(packed, llm)
    try:
        pause.wait()
        assert torch.equal(generated(llm), expected)
        assert torch.equal(opened(llm), llm.model(**PROMPT).logits)
    finally:
        pause.end()
    assert torch.equal(running.result(SECONDS), expected_packed)


@pytest.mark.parametrize("work", [generated, opened, packed])
def test_a_stream_that_another_thread_opens_captures_that_threads_forward_only(llm, other_thread, work):
    expected, expected_opened = work(llm), opened(llm)
    pause = Pause(decoder_of(llm).embed_tokens)  # inside upstream's forward, in front of the first layer
    opening = other_thread.submit(opened, llm)
    try:
        pause.wait()
        assert torch.equal(work(llm), expected)
    finally:
        pause.end()
    assert torch.equal(opening.result(SECONDS), expected_opened)


def test_a_hook_that_is_seen_half_added_or_half_removed_does_not_disturb_another_thread(llm, other_thread):
    expected, first = generated(llm), decoder_of(llm).layers[0]
    pause = Pause(decoder_of(llm).embed_tokens)
    opening = other_thread.submit(opened, llm)
    try:
        pause.wait()
        with_keywords = dict(first._forward_pre_hooks_with_kwargs)
        first._forward_pre_hooks_with_kwargs.clear()  # torch adds to and removes from two tables, one after the other
        assert torch.equal(generated(llm), expected)
        first._forward_pre_hooks_with_kwargs.update(with_keywords)
    finally:
        pause.end()
    opening.result(SECONDS)


def test_three_threads_that_generate_pack_and_open_all_get_what_each_gets_alone(llm):
    works: list[Callable[[SwitchableLLM], torch.Tensor]] = [generated, packed, opened]
    expected = [work(llm) for work in works]
    interval, together = sys.getswitchinterval(), threading.Barrier(3, timeout=SECONDS)

    def repeat(work: Callable[[SwitchableLLM], torch.Tensor]) -> list[torch.Tensor]:
        together.wait()
        return [work(llm) for _ in range(10)]

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(repeat, works))
    finally:
        sys.setswitchinterval(interval)
    for alone, repeated in zip(expected, results, strict=True):
        assert all(torch.equal(alone, result) for result in repeated)
