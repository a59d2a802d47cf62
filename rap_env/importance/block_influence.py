"""Block influence: how much a part of the model turns the residual stream."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from rap_env.components import Site
from rap_env.evaluation.claims import measured_once
from rap_env.evaluation.evaluator import check_finite
from rap_env.evaluation.identity import engine_identity
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import TextEvaluator
from rap_env.llm.switchable import SwitchableLLM


def block_influence(meter: Meter, parts: Sequence[Sequence[Site]]) -> list[float]:
    """Measures 1 - cosine(hidden state in, hidden state out), mean over all tokens (ShortGPT, arXiv 2403.03853).

    One forward of the dense model measures all parts; it is paid for and kept in the store as an evaluation is.

    Args:
        meter: Its evaluator's windows are what is forwarded.
        parts: All sites of the model in its own order, grouped: whole layers, or single sites.

    Returns:
        The influence of each part, between 0 and 2.

    Raises:
        ValueError: The parts are not all sites in model order, or the meter does not evaluate by text.
        SearchExhausted: The token budget does not cover it.
        EvaluationFailed: An influence is not a finite number.
    """
    llm, evaluator = meter.llm, meter.evaluator
    if not isinstance(evaluator, TextEvaluator):
        raise ValueError(f"block influence needs windows of text; got {type(evaluator).__name__}")
    if tuple(site for part in parts for site in part) != llm.shape.sites:
        n_sites = sum(map(len, parts))
        raise ValueError(
            f"expected parts that are the model's {len(llm.shape.sites)} sites in order;"
            f" got {n_sites} sites in {len(parts)} parts"
        )

    def measure(_indices: Sequence[int]) -> Iterator[tuple[int, dict]]:
        started = time.perf_counter()
        influences = _influences(llm, evaluator, parts)
        check_finite(f"block influence on {evaluator.name}", influences, llm)
        yield 0, {"influences": influences, "seconds": time.perf_counter() - started}

    names = [[site.name for site in part] for part in parts]
    identity = engine_identity(llm) | {"kind": "block influences", "parts": names, "text": dict(evaluator.identity)}
    paid = meter.budget.spend(meter.owner, [f"block influence of {len(parts)} parts"], evaluator.windows.numel())
    result = measured_once(meter.store, [identity], measure)[0][0]
    meter.budget.measured_seconds += result["seconds"] if paid else 0.0
    return result["influences"]


def _influences(llm: SwitchableLLM, evaluator: TextEvaluator, parts: Sequence[Sequence[Site]]) -> list[float]:
    """In bfloat16 a cosine near 1 would be rounded to steps of 0.004, so that parts would tie: float32 it is."""
    sums = torch.zeros(len(parts), dtype=torch.float64)
    for batch in evaluator.batches():
        hidden, context = evaluator.open_streams(llm, batch)
        for number, part in enumerate(parts):
            behind = llm.run(part, hidden, context)
            sums[number] += functional.cosine_similarity(hidden.float(), behind.float(), dim=-1).double().sum().cpu()
            hidden = behind
    return (1.0 - sums / evaluator.windows.numel()).tolist()
