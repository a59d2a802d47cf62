"""The process of one system: reads commands from stdin, a line of JSON each, and answers each with one on stdout."""

import importlib.util
import json
import os
import sys
import time
from typing import Any, TextIO

import torch

from experiments.reranking.ranker import Ranker
from experiments.reranking.systems import System
from rap_env.llm.loading import build_tiny_llm
from rap_env.memory.measured import trim_freed_memory

_WARM_UP_DOCUMENTS = 4


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answers until there are no more commands.

    The first command is what to load, answered once it is loaded; those that follow name a request by its number:
    `{"rank": 0, "candidates": 20, "top_k": 5, "threshold": 0.3}` or `{"path": 0, "candidates": 60}`.

    Args:
        commands: Lines of JSON.
        answers: Likewise; the first one, before any command, says that everything is imported.
    """

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    _touch_libraries()
    trim_freed_memory()
    tell({"imported": True})
    spec = json.loads(commands.readline())
    ranker = Ranker(System(**spec["system"]), spec)
    _warm_up(ranker, spec["requests"][0])
    trim_freed_memory()  # what loading or an earlier request left would hide what the next one takes
    tell({"loaded": True, "threads": torch.get_num_threads()})
    for line in commands:
        command = json.loads(line)
        answer = _answer(ranker, spec["requests"][command.get("rank", command.get("path"))], command)
        trim_freed_memory()  # now: the parent sets the mark of the peak back before it asks again
        tell(answer)


@torch.inference_mode()
def _touch_libraries() -> None:
    """Runs a tiny model: code that is imported or read when it is first used is no part of what a system needs."""
    if importlib.util.find_spec("peft"):
        importlib.import_module("peft")
    llm = build_tiny_llm(dtype="bfloat16")
    llm.model(llm.tokenizer("a", return_tensors="pt").input_ids)


def _warm_up(ranker: Ranker, request: dict[str, Any]) -> None:
    ranker.rank(request["query"], request["documents"][:_WARM_UP_DOCUMENTS], None, None)


def _answer(ranker: Ranker, request: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
    query, documents = request["query"], request["documents"][: command["candidates"]]
    if "path" in command:
        return {"path": ranker.path(query, documents), "tokens": ranker.token_counts(query, documents)}
    started = time.perf_counter()
    ranked = ranker.rank(query, documents, command["top_k"], command["threshold"])
    return {"seconds": time.perf_counter() - started, **ranked._asdict()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for package in sys.argv[1:]:
        importlib.import_module(package)  # the code of a library is no part of the memory that a request takes
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
