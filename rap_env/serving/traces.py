"""Request traces: when requests arrive, and how long they are. Recorded, cut and scaled, or made from a seed."""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from rap_env.errors import InvalidConfig, TraceUnreadable

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,12})?(Z|[+-]\d\d:\d\d)?", re.ASCII)
_TOKENS = re.compile(r"\d{1,8}", re.ASCII)
_MOST_TOKENS = 10_000_000  # of one request: no model's context is longer
_PROMPT_MEDIAN, _PROMPT_SPREAD = 795.1, 0.955  # see `synthetic_trace`
_GENERATED_MEDIAN, _GENERATED_SPREAD = 151.5, 0.793


@dataclass(frozen=True)
class Arrival:
    """A request of a trace.

    Attributes:
        seconds: When it arrives, counted from the first request of the trace.
        prompt_tokens: How many tokens its prompt has.
        generated_tokens: How many tokens are generated for it.
    """

    seconds: float
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Bursts:
    """How unevenly requests arrive: a Poisson process whose rate jumps between a calm and a burst value at random.

    Attributes:
        ratio: The rate in bursts over the calm rate; 1 is a plain Poisson process.
        share: Share of the time that bursts take.
        requests: How many requests a burst has on the mean.

    Raises:
        InvalidConfig: The ratio is below 1, the share is not between 0 and 1, or a burst has less than one request.
    """

    ratio: float = 4.0
    share: float = 0.2
    requests: float = 20.0

    def __post_init__(self) -> None:
        for name in ("ratio", "requests"):
            _check_number(name, getattr(self, name), at_least=1.0)
        if not 0.0 < self.share < 1.0:
            raise InvalidConfig(f"share: expected above 0 and below 1; got {self.share}")


def read_trace(path: str | Path) -> list[Arrival]:
    """Reads a trace of the form of the Azure LLM inference traces, <https://github.com/Azure/AzurePublicDataset>.

    A CSV file with a header and the columns TIMESTAMP (`2023-11-16 18:15:46.6805900`; UTC unless it names an offset;
    read to microseconds), ContextTokens and GeneratedTokens, in the order of time. Other columns are ignored.

    Args:
        path: Of the file.

    Returns:
        The requests, at least one; seconds are counted from the first.

    Raises:
        TraceUnreadable: A line is not of this form, goes back in time, or there is no request; the message names the
            line.
        OSError: The file can't be read.
    """
    arrivals: list[Arrival] = []
    first = before = None
    for number, row in _rows(Path(path)):
        timestamp, prompt, generated = (_field(path, number, row, name) for name in _COLUMNS)
        now = _moment(path, number, timestamp)
        first, before = first or now, before or now
        if now < before:
            raise TraceUnreadable(path, number, f"expected lines in the order of time; got {timestamp} after {before}")
        before = now
        tokens = [_tokens(path, number, *pair) for pair in zip(_COLUMNS[1:], (prompt, generated), strict=True)]
        arrivals.append(Arrival((now - first).total_seconds(), *tokens))
    if not arrivals:
        raise TraceUnreadable(path, 2, "expected at least one request; the file ends")
    return arrivals


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows after the header, each with the number of the line on which it begins."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in _COLUMNS if name not in header]:
                raise TraceUnreadable(
                    path, 1, f"expected the columns {', '.join(_COLUMNS)}; missing: {', '.join(missing)}"
                )
            number = reader.line_num
            for row in reader:
                if row and len(row) != len(header):
                    raise TraceUnreadable(path, number + 1, f"expected {len(header)} fields; got {len(row)}")
                if row:
                    yield number + 1, dict(zip(header, row, strict=True))
                number = reader.line_num
    except (csv.Error, UnicodeError) as error:
        raise TraceUnreadable(path, number + 1, f"expected CSV; {error}") from error


def _field(path: str | Path, number: int, row: dict[str, str], name: str) -> str:
    if not (text := row[name].strip()):
        raise TraceUnreadable(path, number, f"{name} is empty")
    return text


def _moment(path: str | Path, number: int, text: str) -> datetime:
    try:
        if _TIMESTAMP.fullmatch(text):
            moment = datetime.fromisoformat(text)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # no such day or hour, or beyond what dates hold
        pass
    raise TraceUnreadable(path, number, f"TIMESTAMP: expected such as 2023-11-16 18:15:46.6805900; got {text[:40]!r}")


def _tokens(path: str | Path, number: int, name: str, text: str) -> int:
    if _TOKENS.fullmatch(text) and int(text) <= _MOST_TOKENS:
        return int(text)
    raise TraceUnreadable(path, number, f"{name}: expected a whole number from 0 to {_MOST_TOKENS}; got {text[:40]!r}")


def scaled(
    arrivals: Sequence[Arrival],
    n_requests: int,
    start: int,
    requests_per_second: float,
    longest_prompt: int,
    longest_generated: int,
) -> list[Arrival]:
    """A stretch of a trace, at another rate and with capped lengths.

    Args:
        arrivals: The trace.
        n_requests: How many requests the stretch has.
        start: Which request is its first, counted from 0.
        requests_per_second: Mean rate of the result: the time between requests is stretched evenly, so that bursts
            stay bursts. Requests that all arrive at one time stay so.
        longest_prompt: Cap on prompt tokens. Longer prompts count as so long, so a low cap makes most prompts equal.
        longest_generated: The same for generated tokens.

    Returns:
        The requests, the first at 0 seconds, each with at least one token of both kinds.

    Raises:
        InvalidConfig: The trace has no such stretch, the rate is no positive number, or a cap is below 1.
    """
    caps = {"longest_prompt": longest_prompt, "longest_generated": longest_generated, "n_requests": n_requests}
    for name, value in caps.items():
        _check_number(name, value, at_least=1)
    _check_rate(requests_per_second)
    if start < 0 or start + n_requests > len(arrivals):
        raise InvalidConfig(
            f"start, n_requests: expected a stretch of the {len(arrivals)} requests; got {n_requests} from {start}"
        )
    chosen = arrivals[start : start + n_requests]
    first_seconds = chosen[0].seconds
    span_seconds = chosen[-1].seconds - first_seconds
    factor = (n_requests - 1) / requests_per_second / span_seconds if span_seconds > 0 else 1.0
    return [
        Arrival(
            (arrival.seconds - first_seconds) * factor,
            min(max(1, arrival.prompt_tokens), longest_prompt),
            min(max(1, arrival.generated_tokens), longest_generated),
        )
        for arrival in chosen
    ]


def synthetic_trace(
    n_requests: int,
    requests_per_second: float,
    seed: int,
    length_scale: float = 1.0,
    bursts: Bursts | None = None,
) -> list[Arrival]:
    """A trace that needs no file: bursts of requests, with log-normal lengths like those of a chat service.

    The lengths' two parameters are least-squares fits of log quantiles to those of a normal distribution, at 5, 10, 25,
    50, 75, 90 and 95% of the 19,366 requests in AzureLLMInferenceTrace_conv.csv (2023) of the Azure LLM inference
    traces, that is `np.polyfit(scipy.stats.norm.ppf(shares), np.log(np.quantile(tokens, shares)), 1)`:

    | tokens    | quantiles of the trace                   | of the fit                              | median | sigma |
    |-----------|------------------------------------------|-----------------------------------------|--------|-------|
    | prompt    | 181, 207, 396, 1020, 1189, 2734.5, 4083  | 165, 234, 417, 795, 1514, 2704, 3826    | 795.1  | 0.955 |
    | generated | 41, 54, 85, 129, 395, 424, 451           | 41, 55, 89, 152, 259, 419, 559          | 151.5  | 0.793 |

    The fit smooths away that generated lengths there have two peaks. Both lengths are drawn independently (the
    correlation of their logarithms is 0.09). The bursts are not fitted: that trace's rate changes more mildly, by a
    quarter around its mean of 5.5 requests a second and over minutes, which some hundred requests would not show.

    Args:
        n_requests: How many requests.
        requests_per_second: Mean rate that they are drawn with.
        seed: Of all random numbers.
        length_scale: Times all lengths, for models with shorter contexts; `scaled` caps them.
        bursts: How unevenly requests arrive.

    Returns:
        The requests, the first at 0 seconds, each with at least one token of both kinds.

    Raises:
        InvalidConfig: There is no request, or the rate or the scale is no positive number.
    """
    _check_number("n_requests", n_requests, at_least=1)
    _check_rate(requests_per_second)
    if not 0.0 < length_scale < math.inf:
        raise InvalidConfig(f"length_scale: expected a positive number; got {length_scale}")
    rng = np.random.default_rng(seed)
    seconds = _burst_times(n_requests, requests_per_second, bursts or Bursts(), rng)
    prompts = _lengths(n_requests, _PROMPT_MEDIAN * length_scale, _PROMPT_SPREAD, rng)
    generated = _lengths(n_requests, _GENERATED_MEDIAN * length_scale, _GENERATED_SPREAD, rng)
    return [Arrival(*values) for values in zip(seconds, prompts, generated, strict=True)]


def _burst_times(n_requests: int, requests_per_second: float, bursts: Bursts, rng: np.random.Generator) -> list[float]:
    """Arrivals of a two-state Markov-modulated Poisson process that starts in its stationary state, in seconds."""
    calm_rate = requests_per_second / (1.0 - bursts.share + bursts.share * bursts.ratio)
    rates = (calm_rate, calm_rate * bursts.ratio)  # of the calm and of the burst state, per second
    burst_seconds = bursts.requests / rates[1]
    stays_seconds = (burst_seconds * (1.0 - bursts.share) / bursts.share, burst_seconds)  # on the mean
    state = int(rng.random() < bursts.share)
    now, ends, times = 0.0, rng.exponential(stays_seconds[state]), []
    while len(times) < n_requests:
        expected = rng.exponential()  # requests until the next one, if each state's rate is counted as it passes
        while expected > (ends - now) * rates[state]:
            expected -= (ends - now) * rates[state]
            now, state = ends, 1 - state
            ends = now + rng.exponential(stays_seconds[state])
        now += expected / rates[state]
        times.append(now)
    return [time - times[0] for time in times]


def _lengths(n_requests: int, median: float, spread: float, rng: np.random.Generator) -> list[int]:
    values = np.exp(rng.normal(math.log(median), spread, n_requests))
    return np.clip(np.rint(values), 1, _MOST_TOKENS).astype(int).tolist()


def _check_rate(requests_per_second: float) -> None:
    if not 0.0 < requests_per_second < math.inf:
        raise InvalidConfig(f"requests_per_second: expected a positive number; got {requests_per_second}")


def _check_number(name: str, value: float, at_least: float) -> None:
    if not at_least <= value < math.inf:
        raise InvalidConfig(f"{name}: expected at least {at_least}; got {value}")
