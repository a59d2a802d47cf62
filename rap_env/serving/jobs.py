"""What a simulated request is, when it counts as served in time, and what is counted."""

from dataclasses import dataclass

from rap_env.errors import InvalidConfig


@dataclass(frozen=True)
class Targets:
    """When a request counts as served in time, and how long it waits for memory.

    Attributes:
        first_token_seconds: From its arrival to its first token at most.
        token_seconds: For each further token, on the mean, at most.
        patience_seconds: How long a request waits, while no level makes room for any, before it is refused.

    Raises:
        InvalidConfig: One is not positive.
    """

    first_token_seconds: float = 2.0
    token_seconds: float = 0.2
    patience_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("first_token_seconds", "token_seconds", "patience_seconds"):
            if not getattr(self, name) > 0.0:
                raise InvalidConfig(f"{name}: expected more than 0; got {getattr(self, name)}")


class Job:
    """A request on its way.

    Attributes:
        arrived_seconds: When it came.
        prompt_tokens: How long its prompt is.
        generated_tokens: Tokens that it wants.
        unread_tokens: Tokens that its cache does not have; 0 while it generates.
        produced: Tokens generated so far, as of `settled_at`.
        quality: Sum over them of the quality of the level that each came from.
        worst_level: The smallest level that it was in flight with: KV heads that come back are left out for it.
        first_seconds: When its first token came.
        settled_at: The simulation's count of generating steps when the two sums were last brought up to date.
        ends_at: That count when its last token comes.
    """

    __slots__ = (
        *("arrived_seconds", "ends_at", "first_seconds", "generated_tokens", "produced", "prompt_tokens"),
        *("quality", "settled_at", "unread_tokens", "worst_level"),
    )

    def __init__(self, arrived_seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        self.arrived_seconds = arrived_seconds
        self.prompt_tokens, self.generated_tokens = prompt_tokens, generated_tokens
        self.unread_tokens, self.produced, self.quality, self.worst_level = prompt_tokens, 0, 0.0, 0
        self.first_seconds: float | None = None
        self.settled_at = self.ends_at = 0

    @property
    def length(self) -> int:
        """Tokens that its cache is reserved for."""
        return self.prompt_tokens + self.generated_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens that its cache has, once `produced` is up to date: all but the last one, which the next step reads."""
        return self.prompt_tokens + self.produced - (self.unread_tokens or 1)

    def copied(self) -> "Job":
        other = Job.__new__(Job)
        for name in Job.__slots__:
            setattr(other, name, getattr(self, name))
        return other


@dataclass
class Counts:
    """What has happened since the beginning.

    Attributes:
        arrived: Requests that came.
        served: Requests that were generated whole.
        in_time: Those of them that met the targets.
        refused: Requests that no level made room for.
        quality_tokens: Sum over the tokens of requests served in time of the quality of the level each came from.
        generated_tokens: Tokens that came out, of whichever request.
        refused_tokens: Tokens that refused requests wanted.
        forced: How often a level did not fit and a smaller one was taken.
        switches: How often the level changed.
        evictions: How often a cache was given up.
        steps: Steps that read anything.
        fullest: Largest share of the budget that any step took.
    """

    arrived: int = 0
    served: int = 0
    in_time: int = 0
    refused: int = 0
    quality_tokens: float = 0.0
    generated_tokens: int = 0
    refused_tokens: int = 0
    forced: int = 0
    switches: int = 0
    evictions: int = 0
    steps: int = 0
    fullest: float = 0.0

    def copied(self) -> "Counts":
        return Counts(*vars(self).values())


def reward_terms(before: Counts, now: Counts, offered_tokens: int, n_decisions: int) -> dict[str, float]:
    """What rewards are made of, from what happened between two moments of an episode.

    Args:
        before: Counts at the first moment.
        now: Counts at the second one.
        offered_tokens: Tokens that all requests of the episode want.
        n_decisions: Decisions of an episode at most.

    Returns:
        `served` and `refused` as shares of the tokens, `forced` and `switches` as shares of the decisions.
    """
    return {
        "served": (now.quality_tokens - before.quality_tokens) / max(1, offered_tokens),
        "refused": (now.refused_tokens - before.refused_tokens) / max(1, offered_tokens),
        "forced": (now.forced - before.forced) / n_decisions,
        "switches": (now.switches - before.switches) / n_decisions,
    }
