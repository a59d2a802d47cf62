"""What a service counts, for Prometheus."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rap_env.serving.engine import Step
from rap_env.serving.request import Sequence

_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_FIRST_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEP_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """Observes a service; all metrics are in a registry of their own.

    Args:
        weight_bytes: What the components of the dense model take.
        failures: How often each decider failed so far: that of the controller, which goes on counting.
    """

    def __init__(self, weight_bytes: int, failures: Mapping[str, int]) -> None:
        self._weight_bytes, self._failures, self._failures_seen = weight_bytes, failures, dict[str, int]()
        self._registry = registry = CollectorRegistry()
        self._answered = Counter("rap_requests", "Calls by HTTP status; 499: hung up", ["status"], registry=registry)
        self._prompt = Counter("rap_prompt_tokens", "Tokens of prompts, when their sequences end", registry=registry)
        self._generated = Counter("rap_generated_tokens", "Tokens that came out", registry=registry)
        self._first = _histogram("rap_time_to_first_token", "From arrival", _FIRST_SECONDS, registry)
        self._each = _histogram("rap_time_per_output_token", "After the first", _TOKEN_SECONDS, registry)
        self._running = Gauge("rap_running", "Sequences in flight", registry=registry)
        self._waiting = Gauge("rap_waiting", "Sequences that wait", registry=registry)
        self._budget = Gauge("rap_budget_bytes", "What the model may take", registry=registry)
        self._needed = Gauge("rap_needed_bytes", "What weights and KV cache take", registry=registry)
        self._kept = Gauge("rap_kept_weights_ratio", "Share of the components' bytes that is kept", registry=registry)
        self._switches = Counter("rap_switches", "Changes of the mask", registry=registry)
        self._decide = _histogram("rap_decide", "Decisions", _STEP_SECONDS, registry)
        self._switch = _histogram("rap_switch", "Changes of the mask", _STEP_SECONDS, registry)
        self._read = _histogram("rap_read", "Forwards, with the drawing of tokens", _STEP_SECONDS, registry)
        self._evictions = Counter("rap_evictions", "Caches given up, when their sequences end", registry=registry)
        self._failed = Counter("rap_decider_failures", "Failures to decide", ["decider"], registry=registry)

    @property
    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)

    def answered(self, status: int) -> None:
        """A call was answered, to its end."""
        self._answered.labels(str(status)).inc()

    def stepped(self, step: Step) -> None:
        self._running.set(step.running)
        self._waiting.set(step.waiting)
        self._budget.set(step.budget_bytes)
        self._needed.set(step.needed_bytes)
        self._kept.set(step.mask.weight_bytes / self._weight_bytes)
        self._decide.observe(step.decide_seconds)
        if step.switched:
            self._switches.inc()
            self._switch.observe(step.switch_seconds)
        if step.read_tokens:
            self._read.observe(step.read_seconds)
        for name, count in self._failures.items():
            self._failed.labels(name).inc(count - self._failures_seen.get(name, 0))
            self._failures_seen[name] = count

    def generated(self, n_tokens: int) -> None:
        self._generated.inc(n_tokens)

    def ended(self, sequence: Sequence) -> None:
        self._prompt.inc(len(sequence.request.tokens))
        self._evictions.inc(sequence.evictions)
        if sequence.first_seconds is not None:
            self._first.observe(sequence.first_seconds - sequence.arrived_seconds)
            if (n_later := len(sequence.generated) - 1) > 0:
                self._each.observe((sequence.ended_seconds - sequence.first_seconds) / n_later)


def _histogram(name: str, text: str, bounds: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, unit="seconds", buckets=bounds, registry=registry)
