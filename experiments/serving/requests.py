"""The requests of a replay: when they arrive, the text that they bring, and how likely the dense model finds it."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from experiments.recipes.build import build_halves
from rap_env.calibration.sampling import joined_tokens
from rap_env.errors import InvalidConfig
from rap_env.evaluation.scoring import ScoringPlan
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.serving.traces import read_trace, scaled, synthetic_trace

_STRIDE = 7919  # tokens between the beginnings of two prompts; a prime, so that a short text is not cut alike each time


def requests_of(config: DictConfig, llm: SwitchableLLM) -> list[dict[str, Any]]:
    """Requests in the order of their arrival: `number`, `seconds`, tokens of the report text as `prompt` and `answer`.

    Args:
        config: The composed config.
        llm: Its tokenizer cuts the text.

    Raises:
        InvalidConfig: The text is too short for the longest request.
        TraceUnreadable: The trace's file is damaged.
    """
    trace = config.trace
    if trace.path is None:
        found = synthetic_trace(trace.n_requests, trace.requests_per_second, trace.seed, trace.length_scale)
    else:
        found = read_trace(trace.path)
    start = 0 if trace.path is None else trace.start
    arrivals = scaled(
        found, trace.n_requests, start, trace.requests_per_second, trace.longest_prompt, trace.longest_generated
    )
    reported = build_halves(config.evaluation, llm).reported
    tokens = joined_tokens([text for texts in reported.values() for text in texts], llm.tokenizer).tolist()
    longest = trace.longest_prompt + trace.longest_generated
    if len(tokens) < longest:
        raise InvalidConfig(f"expected a report text of at least {longest} tokens; it has {len(tokens)}")
    requests = []
    for number, arrival in enumerate(arrivals):
        begin = number * _STRIDE % (len(tokens) - longest + 1)
        middle, end = begin + arrival.prompt_tokens, begin + arrival.prompt_tokens + arrival.generated_tokens
        own = {"prompt": tokens[begin:middle], "answer": tokens[middle:end]}
        requests.append({"number": number, "seconds": arrival.seconds, **own})
    return requests


def dense_log_likelihoods(llm: SwitchableLLM, requests: Sequence[Mapping[str, Any]]) -> list[float]:
    """What the dense model thinks of each answer, all its tokens together."""
    pairs = [(tuple(request["prompt"]), tuple(request["answer"])) for request in requests]
    _mask, scores = next(iter(ScoringPlan(pairs).run(llm, [PruningMask.all_kept(llm.shape)])))
    return [score for score, _greedy in scores]
