"""Mixed load on an endpoint of its own process while its memory budget moves: who dies, what is wrong, what grows."""

import collections
import contextlib
import itertools
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

_PROMPTS = [f"{start} the {noun}" for start in ("Once upon a time,", "Why is") for noun in ("sea", "hill", "king")]
_TOKENS = 16
_WIDE_SECONDS, _NARROW_SECONDS = 20.0, 10.0
_SHARES = (0.9, 0.75, 0.6)  # of what the model needs, in turn
_CLIENTS = 3  # of each kind
_WARM_SHARE = 0.25  # of the wide phases, before memory is looked at
_REFUSED = range(400, 500)


@dataclass
class Seen:
    """What clients saw; they share it, and counters of Python take one step each."""

    statuses: collections.Counter = field(default_factory=collections.Counter)
    compared: int = 0
    faults: list[str] = field(default_factory=list)


class Endpoint:
    """A server in a process of its own, whose budget is a file.

    Args:
        folder: For the budget and the log.
        options: Of `scripts.endpoint`.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self._budget, self.log, self.changes = folder / "budget", folder / "log", 0
        self.allow(2**40)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        command = [sys.executable, "-m", "scripts.endpoint", f"port={port}", f"budget_file={self._budget}", *options]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        while not self._answers():
            if not self.alive:
                raise RuntimeError(f"the endpoint did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.2)
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/health").status_code == 200
        return False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def resident_bytes(self) -> int:
        return psutil.Process(self._process.pid).memory_info().rss

    @property
    def needed_bytes(self) -> int:
        return self.client.get("/health").json()["needed_bytes"]

    def allow(self, n_bytes: int) -> None:
        self.changes += 1
        self._budget.write_text(str(n_bytes))

    def mask(self) -> tuple[float, ...]:
        """The share of the weights that is kept, how often that changed so far, and how often the budget did.

        The last one, because a step may be counted after its token was sent.
        """
        text, names = self.client.get("/metrics").text, ("rap_kept_weights_ratio", "rap_switches_total")
        found = (float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1]) for name in names)
        return *found, self.changes

    def asked(self, prompt: str, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0} | fields

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def soak(endpoint: Endpoint, minutes: float, seed: int = 0) -> dict[str, Any]:
    """Loads an endpoint and moves its budget, from all that the model needs to a part of it and back.

    Greedy answers are compared with those of the same server before the load wherever the whole model was there from
    before the call until after it.

    Returns:
        `statuses` of calls, answers `compared`, `faults`, `killed`, resident bytes at the end of each wide phase, and
        their slope in bytes a minute, by least squares without the first quarter.
    """
    expected = {prompt: _text(endpoint.client, endpoint.asked(prompt)) for prompt in _PROMPTS}
    seen, over = Seen(), threading.Event()
    dense_bytes = endpoint.needed_bytes
    kinds = (_compare, _stream, _abuse)
    clients = [
        threading.Thread(target=_ask_on, args=(kind, endpoint, expected, seen, over, seed + number), daemon=True)
        for number, kind in enumerate(kinds * _CLIENTS)
    ]
    for client in clients:
        client.start()
    resident = list(_phases(endpoint, dense_bytes, time.monotonic() + 60 * minutes))
    over.set()
    for client in clients:
        client.join(120)
    later = resident[int(_WARM_SHARE * len(resident)) :]
    slope = np.polyfit(*zip(*later, strict=True), 1)[0] if len(later) > 1 else None
    return {
        "statuses": dict(seen.statuses),
        "compared": seen.compared,
        "faults": seen.faults[:100] + [f"{client.name} did not end" for client in clients if client.is_alive()],
        "killed": not endpoint.alive,
        "minutes_and_resident_bytes": resident,
        "slope_bytes_per_minute": slope,
    }


def _phases(endpoint: Endpoint, dense_bytes: int, end: float) -> Iterator[tuple[float, int]]:
    started, number = time.monotonic(), 0
    while time.monotonic() < end and endpoint.alive:
        endpoint.allow(2**40)
        samples = []
        for _ in range(int(_WIDE_SECONDS)):
            time.sleep(1.0)
            samples.append(endpoint.resident_bytes if endpoint.alive else 0)
        yield (time.monotonic() - started) / 60, int(np.median(samples[len(samples) // 2 :]))
        endpoint.allow(int(_SHARES[number % len(_SHARES)] * dense_bytes))
        time.sleep(_NARROW_SECONDS)
        number += 1
    endpoint.allow(2**40)


def _ask_on(kind, endpoint: Endpoint, expected: dict[str, str], seen: Seen, over: threading.Event, seed: int) -> None:
    rng = random.Random(seed)
    with httpx.Client(base_url=endpoint.client.base_url, timeout=120) as client:
        while not over.is_set() and endpoint.alive:
            try:
                kind(client, endpoint, expected, seen, rng)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                seen.faults.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:200])


def _text(client: httpx.Client, asked: dict[str, Any]) -> str:
    return client.post("/v1/completions", json=asked).json()["choices"][0]["text"]


def _compare(client, endpoint: Endpoint, expected: dict[str, str], seen: Seen, rng: random.Random) -> None:
    prompt, before = rng.choice(_PROMPTS), endpoint.mask()
    answer = client.post("/v1/completions", json=endpoint.asked(prompt))
    seen.statuses[str(answer.status_code)] += 1
    if answer.status_code == 200:
        text = answer.json()["choices"][0]["text"]
        if before == endpoint.mask() and before[0] == 1.0:
            seen.compared += 1
            if text != expected[prompt]:
                seen.faults.append(f"{prompt!r}: expected {expected[prompt]!r}; got {text!r}")
    elif answer.status_code not in (429, 503):
        seen.faults.append(f"{prompt!r}: {answer.status_code}: {answer.text[:100]}")


def _stream(client, endpoint: Endpoint, expected: dict[str, str], seen: Seen, rng: random.Random) -> None:
    """Every third time it hangs up after a few events."""
    hangs_up = rng.random() < 0.3
    asked = endpoint.asked(rng.choice(_PROMPTS), stream=True, max_tokens=60, temperature=0.8, seed=rng.randrange(9))
    with client.stream("POST", "/v1/completions", json=asked) as answer:
        seen.statuses[f"{answer.status_code}, stream"] += 1
        lines = list(itertools.islice(answer.iter_lines(), 6 if hangs_up else None))
        if answer.status_code == 200 and not hangs_up and lines[-2:-1] != ["data: [DONE]"]:
            seen.faults.append(f"a stream ended with {lines[-3:]}"[:200])


def _abuse(client, endpoint: Endpoint, expected: dict[str, str], seen: Seen, rng: random.Random) -> None:
    time.sleep(0.2)
    bodies = (b"{", rng.randbytes(200), b"[" * 5000, b"x" * 3_000_000, b'{"model": 3}', b'{"prompt": "a"}')
    answer = client.post("/v1/completions", content=rng.choice(bodies), headers={"content-type": "application/json"})
    seen.statuses[f"{answer.status_code}, abuse"] += 1
    if answer.status_code not in _REFUSED:
        seen.faults.append(f"abuse was answered with {answer.status_code}")
