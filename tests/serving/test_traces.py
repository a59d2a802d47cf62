"""Request traces: what is read, what is refused and where, cutting and scaling, and traces from a seed."""

import itertools
import pickle

import numpy as np
import pytest

from rap_env.errors import InvalidConfig, TraceUnreadable
from rap_env.serving.traces import Arrival, Bursts, read_trace, scaled, synthetic_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
GOOD = "2023-11-16 18:15:46.6805900,374,44"


def written(tmp_path, *lines, end="\n", prefix=b""):
    path = tmp_path / "trace.csv"
    path.write_bytes(prefix + end.join(lines).encode(errors="surrogateescape"))
    return path


def test_a_trace_of_the_azure_form_is_read_in_seconds_from_its_first_line(tmp_path):
    path = written(tmp_path, HEADER, GOOD, "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:15:50.9951690,7,0")
    arrivals = read_trace(path)
    assert arrivals[0] == Arrival(0.0, 374, 44)
    assert arrivals[1].seconds == pytest.approx(4.314579, abs=2e-6)
    assert arrivals[1:] == [Arrival(arrivals[1].seconds, 396, 109), Arrival(arrivals[1].seconds, 7, 0)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_line_ends_byte_order_marks_blank_lines_offsets_and_other_columns_change_nothing(tmp_path, end, prefix):
    lines = ("GeneratedTokens,Model,TIMESTAMP,ContextTokens", '44,"a,b",2023-11-16T18:15:46Z,374', "")
    lines = (*lines, "1,x,2023-11-16 20:15:47.5+02:00,2", "")
    assert read_trace(written(tmp_path, *lines, end=end, prefix=prefix)) == [Arrival(0, 374, 44), Arrival(1.5, 2, 1)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2023-11-16 18:15:47,374", "expected 3 fields; got 2"),
        ("2023-11-16 18:15:47,374,4,4", "expected 3 fields; got 4"),
        ("2023-11-16 18:15:47,-1,44", "ContextTokens: expected a whole number from 0 to 10000000; got '-1'"),
        ("2023-11-16 18:15:47,1,NaN", "GeneratedTokens: expected a whole number .* got 'NaN'"),
        ("2023-11-16 18:15:47,1,4.5", "GeneratedTokens"),
        ("2023-11-16 18:15:47,1,", "GeneratedTokens is empty"),
        ("2023-11-16 18:15:47,many,1", "ContextTokens: .* got 'many'"),
        ("2023-11-16 18:15:47,10000001,1", ".* got '10000001'"),
        (f"2023-11-16 18:15:47,{'9' * 5000},1", ".* got '9{40}'"),
        ("2023-11-16 18:15:47,١٢,1", "ContextTokens"),
        ("2023-13-16 18:15:47,1,1", "TIMESTAMP: expected such as 2023-11-16 18:15:46.6805900; got '2023-13-16 18"),
        ("0001-01-01 00:00:00+23:00,1,1", "TIMESTAMP"),
        ("1700158546,1,1", "TIMESTAMP"),
        ("nan,1,1", "TIMESTAMP"),
        ("2023-11-16 18:15:46.6,1,1", "expected lines in the order of time; got 2023-11-16 18:15:46.6 after"),
        ('"2023-11-16 18:15:47,1,1', "expected 3 fields; got 1"),
        (f"{'9' * 200_000},1,1", "expected CSV; field larger than"),
        ("2023-11-16 18:15:47,1,1\udcff", r"GeneratedTokens: .* got '1\\\\xff'"),
    ],
)
def test_a_damaged_line_is_named_with_what_is_wrong(tmp_path, line, problem):
    path = written(tmp_path, HEADER, GOOD, "", line, "2023-11-16 18:15:48,1,1")
    with pytest.raises(TraceUnreadable, match=rf"trace\.csv, line 4: {problem}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "line 1: expected the columns TIMESTAMP, ContextTokens, GeneratedTokens; missing: TIMESTAMP, Con"),
        (b"TIMESTAMP,ContextTokens\n1,2\n", "line 1: .* missing: GeneratedTokens$"),
        (HEADER.encode(), "line 2: expected at least one request"),
        (HEADER.encode("utf-16"), "line 1: expected the columns"),
        (f"{HEADER}\n{GOOD}\n".encode() + b"\xff", "line 3: expected 3 fields; got 1"),
        (HEADER.replace(",", ";").encode(), "line 1: expected the columns"),
    ],
)
def test_a_file_without_requests_or_of_another_kind_is_refused(tmp_path, content, problem):
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    with pytest.raises(TraceUnreadable, match=problem):
        read_trace(path)


def test_the_error_crosses_process_borders():
    error = TraceUnreadable("a.csv", 3, "expected b; got c")
    assert str(pickle.loads(pickle.dumps(error))) == "a.csv, line 3: expected b; got c"


def test_a_stretch_is_scaled_to_a_rate_and_capped_with_at_least_one_token():
    arrivals = [Arrival(0, 1, 1), Arrival(10, 0, 900), Arrival(11, 5000, 0), Arrival(14, 7, 8), Arrival(99, 1, 1)]
    assert scaled(arrivals, 3, 1, requests_per_second=0.5, longest_prompt=100, longest_generated=50) == [
        Arrival(0.0, 1, 50),
        Arrival(1.0, 100, 1),
        Arrival(4.0, 7, 8),
    ]
    assert scaled(arrivals, 1, 4, 0.5, 10, 10) == [Arrival(0, 1, 1)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((3, 0, 1.0, 9, 9), "expected a stretch of the 2 requests; got 3 from 0"),
        ((2, 1, 1.0, 9, 9), "expected a stretch"),
        ((1, -1, 1.0, 9, 9), "expected a stretch"),
        ((0, 0, 1.0, 9, 9), "n_requests: expected at least 1; got 0"),
        ((1, 0, 0.0, 9, 9), "requests_per_second"),
        ((1, 0, float("nan"), 9, 9), "requests_per_second"),
        ((1, 0, 1.0, 0, 9), "longest_prompt"),
        ((1, 0, 1.0, 9, 0), "longest_generated"),
    ],
)
def test_a_stretch_that_cannot_be_had_is_refused(arguments, problem):
    with pytest.raises(InvalidConfig, match=problem):
        scaled([Arrival(0, 1, 1), Arrival(1, 1, 1)], *arguments)


def test_a_synthetic_trace_has_the_lengths_of_the_fit_and_the_rate_that_was_asked_for():
    arrivals = synthetic_trace(20_000, requests_per_second=3.0, seed=0)
    prompts, generated = (
        np.array([getattr(a, f"{kind}_tokens") for a in arrivals]) for kind in ("prompt", "generated")
    )
    shares = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]
    np.testing.assert_allclose(np.quantile(prompts, shares), [165, 234, 417, 795, 1514, 2704, 3826], rtol=0.06)
    np.testing.assert_allclose(np.quantile(generated, shares), [41, 55, 89, 152, 259, 419, 559], rtol=0.06)
    assert 20_000 / arrivals[-1].seconds == pytest.approx(3.0, rel=0.1)
    assert arrivals[0].seconds == 0 and min(prompts.min(), generated.min()) >= 1
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(arrivals))
    assert all(type(a.prompt_tokens) is int and type(a.seconds) is float for a in arrivals[:10])


def test_a_seed_gives_one_trace_and_another_seed_another():
    assert synthetic_trace(50, 1.0, seed=1) == synthetic_trace(50, 1.0, seed=1) != synthetic_trace(50, 1.0, seed=2)


def test_bursts_make_counts_vary_more_than_a_poisson_process_does():
    def dispersion(bursts):  # variance over mean of the counts in windows of 10 s: 1 for a Poisson process
        seconds = [a.seconds for a in synthetic_trace(20_000, 2.0, seed=3, bursts=bursts)]
        counts = np.histogram(seconds, np.arange(0, seconds[-1], 10))[0]
        return counts.var() / counts.mean()

    assert dispersion(Bursts(ratio=1.0)) == pytest.approx(1.0, abs=0.15)
    assert dispersion(Bursts()) > 4.0


def test_a_length_scale_shortens_and_never_to_nothing():
    long, short, tiny = (synthetic_trace(500, 1.0, seed=0, length_scale=scale) for scale in (1.0, 0.25, 1e-9))
    assert np.median([a.prompt_tokens for a in short]) == pytest.approx(
        0.25 * np.median([a.prompt_tokens for a in long]), rel=0.01
    )
    assert {(a.prompt_tokens, a.generated_tokens) for a in tiny} == {(1, 1)}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: synthetic_trace(0, 1.0, 0), "n_requests"),
        (lambda: synthetic_trace(1, -1.0, 0), "requests_per_second"),
        (lambda: synthetic_trace(1, 1.0, 0, length_scale=float("nan")), "length_scale"),
        (lambda: Bursts(ratio=0.5), "ratio"),
        (lambda: Bursts(share=1.0), "share"),
        (lambda: Bursts(requests=0.0), "requests"),
    ],
)
def test_settings_that_no_trace_can_have_are_refused(make, problem):
    with pytest.raises(InvalidConfig, match=problem):
        make()
