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


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answers until there are no more commands.

    The first command is what to load, and a request to warm up with; those that follow have a request each:
    `{"rank": 0, "query": "...", "documents": ["..."], "top_k": 5, "threshold": 0.3}`, or `path` in place of `rank`.

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
    ranker.rank(**spec["warm_up"], top_k=None, threshold=None)
    trim_freed_memory()  # what loading or an earlier request left would hide what the next one takes
    tell({"loaded": True, "threads": torch.get_num_threads()})
    for line in commands:
        command = json.loads(line)
        answer = _answer(ranker, command)
        trim_freed_memory()  # now: the parent sets the mark of the peak back before it asks again
        tell(answer)


@torch.inference_mode()
def _touch_libraries() -> None:
    """Runs a tiny model: code that is imported or read when it is first used is no part of what a system needs."""
    if importlib.util.find_spec("peft"):
        importlib.import_module("peft")
    llm = build_tiny_llm(dtype="bfloat16")
    llm.model(llm.tokenizer("a", return_tensors="pt").input_ids)


def _answer(ranker: Ranker, command: dict[str, Any]) -> dict[str, Any]:
    query, documents = command["query"], command["documents"]
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
