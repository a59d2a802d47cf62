"""What a replay came to: who was served, how fast and how well, and whether memory was kept to."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.serving.child import Outcome

_PERCENTILES = (50, 95, 99)
_ROWS = 3000  # of columns over time, which are for pictures


def summary(
    found: Mapping[str, Any],
    requests: Sequence[Mapping[str, Any]],
    dense: Sequence[float],
    window_seconds: float,
) -> dict[str, Any]:
    """One system's results.

    Args:
        found: `lines` that its process wrote, and the `outcome` that its watchdog saw.
        requests: What it was asked.
        dense: Log-likelihood of each answer under the dense model.
        window_seconds: A switch back within so much time is chatter.

    Returns:
        Numbers, and columns over time for pictures. Loss over dense is in nats a token of what was generated, whether
        its request ended or not; goodput counts a token of a request that was served to the end by the ratio of the
        perplexities that the dense and the live model have on its answer, at most 1.
    """
    outcome: Outcome = found["outcome"]
    sequences = [line for line in found["lines"] if "status" in line]
    steps = [line["step"] for line in found["lines"] if "step" in line]
    told = {name: value for line in found["lines"] if "status" not in line for name, value in line.items()}
    states = Counter(each["status"] for each in sequences)
    seconds = told.get("seconds", outcome.samples[-1].seconds if outcome.samples else 0.0)
    served = [each for each in sequences if each["status"] == "finished"]
    return {
        "killed": None if outcome.kill is None else str(outcome.kill),
        "exit_code": outcome.exit_code,
        "asked": len(requests),
        "served": states["finished"],
        "refused": states["refused"],
        "failed": states["failed"],
        "lost": len(requests) - len(sequences),
        "evictions": sum(each["evictions"] for each in sequences),
        "seconds": seconds,
        **_latencies(served),
        **_quality(served, requests, dense, seconds),
        "peak_bytes": outcome.peak_bytes,
        "watchdog": _watched(outcome),
        **(_steps(steps, told, window_seconds) if steps else {}),
        "sequences": sequences,
    }


def _latencies(served: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time to the first token, and for each token after it; percentiles over the requests that were served."""
    first = [each["first_seconds"] - each["arrived_seconds"] for each in served]
    later = [
        (each["ended_seconds"] - each["first_seconds"]) / (each["generated_tokens"] - 1)
        for each in served
        if each["generated_tokens"] > 1
    ]
    return {"first_token_seconds": _percentiles(first), "token_seconds": _percentiles(later)}


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    return {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES} if len(values) else None


def _quality(
    served: Sequence[Mapping[str, Any]], requests: Sequence[Mapping[str, Any]], dense: Sequence[float], seconds: float
) -> dict[str, Any]:
    losses, tokens = [], []
    for each in served:
        n_tokens = len(requests[each["number"]]["answer"])
        losses.append((dense[each["number"]] - each["log_likelihood"]) / n_tokens)
        tokens.append(n_tokens)
    weighted = sum(n * math.exp(-max(0.0, loss)) for n, loss in zip(tokens, losses, strict=True))
    return {
        "loss_over_dense": float(np.average(losses, weights=tokens)) if served else None,
        "kept_ratio": float(np.average([each["kept_ratio"] for each in served], weights=tokens)) if served else None,
        "tokens_per_second": sum(tokens) / seconds if seconds else 0.0,
        "goodput": weighted / seconds if seconds else 0.0,
    }


def _watched(outcome: Outcome) -> dict[str, Any]:
    """Memory over time, thinned to about ten readings a second or fewer, the largest of each."""
    columns: dict[str, list] = {"seconds": [], "limit_bytes": [], "used_bytes": []}
    apart_seconds = max(0.1, outcome.samples[-1].seconds / _ROWS) if outcome.samples else 0.1
    for sample in outcome.samples:
        if not columns["seconds"] or sample.seconds - columns["seconds"][-1] >= apart_seconds:
            columns["seconds"].append(round(sample.seconds, 3))
            columns["limit_bytes"].append(int(sample.limit_bytes))
            columns["used_bytes"].append(int(sample.used_bytes))
        else:
            columns["used_bytes"][-1] = max(columns["used_bytes"][-1], int(sample.used_bytes))
    return columns


def _steps(lines: Sequence[Mapping[str, Any]], told: Mapping[str, Any], window_seconds: float) -> dict[str, Any]:
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    steps = {name: np.array(column) for name, column in columns.items()}
    switched = steps["switched"]
    busy = float(sum(steps[name].sum() for name in ("decide_seconds", "switch_seconds", "read_seconds")))
    return {
        "switches": int(steps["decisions"][-1]),
        "chatter": sum(bool(seconds < window_seconds) for seconds in _turns(steps)),
        "moved_bytes": int(steps["moved_bytes"].sum()),
        "decide_share": float(steps["decide_seconds"].sum()) / busy,
        "switch_share": float(steps["switch_seconds"].sum()) / busy,
        "switch_seconds": _percentiles(steps["switch_seconds"][switched]),
        "most_needed_bytes": int(steps["needed_bytes"].max()) + told["activation_bytes"],
        "over_budget_steps": int((steps["needed_bytes"] > steps["budget_bytes"]).sum()),
        "failures": told.get("failures"),
        "processor_seconds": told.get("processor_seconds"),
        "baseline_bytes": told["baseline_bytes"],
        "activation_bytes": told["activation_bytes"],
        "steps": {name: column[:: -(-len(lines) // _ROWS)] for name, column in columns.items()},
    }


def _turns(steps: Mapping[str, np.ndarray]) -> list[float]:
    """For each decision that goes back on the one before it, how long after that it came.

    Decisions, not what was applied: what goes leaves at once, what comes a few steps later, for one and the same mask.
    """
    changes = np.diff(steps["wanted_bytes"], prepend=steps["wanted_bytes"][:1])
    found = [(seconds, change > 0) for seconds, change in zip(steps["began_seconds"], changes, strict=True) if change]
    return [later[0] - earlier[0] for earlier, later in pairwise(found) if earlier[1] != later[1]]
