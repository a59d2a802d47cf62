"""The engine's queue without its model: requests in steps whose seconds a table tells, under a budget that moves."""

import math
from collections import deque
from itertools import islice

from rap_env.serving.episodes import Episode
from rap_env.serving.jobs import Counts, Job, Targets
from rap_env.serving.tables import ServingTable

_NEVER = math.inf
_ROUNDING_SECONDS = 1e-9


class Simulation:
    """Serves an episode's requests as `Engine` does, with steps whose seconds come from a table.

    At the beginning of each step: what waits is let in, first come first served, as far as the level holds it. If the
    level does not hold what is in flight, or not even the first that waits, the largest that does is taken; if none
    does, those that came last give their caches up and are read again later. Then the last token of each sequence that
    generates is read, and prompts in order with what is left of the step's tokens.

    Where it is simpler than the engine:

    - As many requests are let in, or stay, as fit; the engine's controller tries half as many, and half of these.
    - Activations are those of a full batch.
    - A switch stops everything for its seconds, also one that grows, which the engine reads ahead; caches are copied
      in no time.
    - Caches are reserved at the level's bytes for each token even where a sequence lacks heads.
    - A sequence that was in flight with a smaller level counts with that level's quality until it ends, although only
      KV heads stay away and channels of MLPs come back.

    Args:
        table: Levels and seconds.
        episode: What happens.
        whole_bytes: What a budget share of 1 means.
        targets: When a request counts as served in time.

    Attributes:
        now: Seconds since the beginning.
        level: What it runs with.
        budget_bytes: What it may take.
        switched_seconds: When the level last changed; 0 before.
        counts: What happened.
        running: In flight, in the order of coming in: first those that generate, then those whose prompts are read.
        waiting: Not let in yet.
        reserved_tokens: Tokens that caches in flight are reserved for.
    """

    def __init__(self, table: ServingTable, episode: Episode, whole_bytes: int, targets: Targets) -> None:
        self.table, self.episode, self.targets = table, episode, targets
        self._whole_bytes, self._last = whole_bytes, len(table.levels) - 1
        self._fixed = [table.needed_bytes(level, 0) for level in range(len(table.levels))]
        self._kv = [level.kv_bytes_per_token for level in table.levels]
        self._quality = [level.quality for level in table.levels]
        self.now, self.level, self.switched_seconds = 0.0, 0, 0.0
        self.counts = Counts()
        self.waiting: deque[Job] = deque()
        self._generating: list[Job] = []
        self._reading: list[Job] = []
        self.reserved_tokens = self._cached_tokens = self._count = 0
        self._next_arrival = self._next_budget = 0
        self._short_since = _NEVER  # since when nothing can be served
        self.budget_bytes = 0
        self._catch_up()

    @property
    def running(self) -> list[Job]:
        return self._generating + self._reading

    @property
    def n_running(self) -> int:
        return len(self._generating) + len(self._reading)

    @property
    def wanted_tokens(self) -> int:
        """Tokens that caches are reserved for, once all that waits is in flight for which there is a place."""
        coming = islice(self.waiting, self.table.max_batch - self.n_running)
        return self.reserved_tokens + sum(job.length for job in coming)

    @property
    def unread_tokens(self) -> int:
        """Tokens that are to be read before what waits or is being read can generate."""
        return sum(job.unread_tokens for job in self._reading) + sum(job.unread_tokens for job in self.waiting)

    @property
    def pending_quality(self) -> float:
        """Quality of the tokens that came out so far of requests in flight that may still be in time."""
        total, now = 0.0, self.now
        for job in self.running:
            first = now if job.first_seconds is None else job.first_seconds
            if first - job.arrived_seconds <= self.targets.first_token_seconds:
                fresh = self._count - job.settled_at if job.unread_tokens == 0 else 0
                total += job.quality + fresh * self._quality[job.worst_level]
        return total

    def needed_bytes(self, level: int) -> int:
        """What a level would take now, with the caches in flight."""
        return self._fixed[level] + self._kv[level] * self.reserved_tokens

    def largest_fitting(self, n_tokens: int, budget_bytes: float) -> int | None:
        """The largest level that a budget holds with so many cached tokens."""
        for level, (fixed, kv) in enumerate(zip(self._fixed, self._kv, strict=True)):
            if fixed + kv * n_tokens <= budget_bytes:
                return level
        return None

    def clone(self) -> "Simulation":
        """One that goes on by itself from here."""
        other = Simulation.__new__(Simulation)
        other.__dict__.update(self.__dict__)
        other.counts, other.waiting = self.counts.copied(), deque(self.waiting)  # what waits is never changed
        other._generating = [job.copied() for job in self._generating]
        other._reading = [job.copied() for job in self._reading]
        return other

    def advance(self, level: int, until_seconds: float) -> None:
        """Goes on with a level until the first step that ends at a time or after it."""
        fits = self._fitting(level)
        self._go_to(self._last if fits is None else fits)
        self.counts.forced += self.level != level
        self._catch_up()
        while self.now < until_seconds:
            self._make_room()
            self._let_in()
            if self._generating or self._reading:
                share = self.needed_bytes(self.level) / max(1, self.budget_bytes)
                self.counts.fullest = max(self.counts.fullest, share)
                if self._reading:
                    self._read_step()
                else:
                    self._generate_until(min(until_seconds, self._next_event_seconds()))
                self._short_since = _NEVER
            else:
                self._refuse()
                # a switch may have taken longer than the time that was to pass
                self.now = max(self.now, min(until_seconds, self._next_event_seconds(), self._patience_ends()))
            self._catch_up()

    def _catch_up(self) -> None:
        """Takes in what arrived and what the budget has become."""
        arrivals, memory = self.episode.arrivals, self.episode.memory
        while self._next_arrival < len(arrivals) and arrivals[self._next_arrival].seconds <= self.now:
            arrival = arrivals[self._next_arrival]
            self.waiting.append(Job(arrival.seconds, arrival.prompt_tokens, arrival.generated_tokens))
            self._next_arrival += 1
            self.counts.arrived += 1
        while self._next_budget < len(memory.seconds) and memory.seconds[self._next_budget] <= self.now:
            self.budget_bytes = int(memory.shares[self._next_budget] * self._whole_bytes)
            self._next_budget += 1

    def _next_event_seconds(self) -> float:
        """When the next request comes or the budget changes."""
        arrivals, times = self.episode.arrivals, self.episode.memory.seconds
        arrival = arrivals[self._next_arrival].seconds if self._next_arrival < len(arrivals) else _NEVER
        return min(arrival, times[self._next_budget] if self._next_budget < len(times) else _NEVER)

    def _patience_ends(self) -> float:
        """When the first that waits is refused; time in flight is no waiting."""
        first = min((job.arrived_seconds for job in self.waiting), default=_NEVER)
        return max(first, self._short_since) + self.targets.patience_seconds

    def _fitting(self, level: int) -> int | None:
        """The level, or the next smaller one that holds what is in flight or the first that waits, if one does."""
        tokens = self.reserved_tokens
        if not self._generating and not self._reading and self.waiting:
            tokens = self.waiting[0].length
        for fitting in range(level, self._last + 1):
            if self._fixed[fitting] + self._kv[fitting] * tokens <= self.budget_bytes:
                return fitting
        return None

    def _make_room(self) -> None:
        fits = self._fitting(self.level)
        if fits == self.level:
            return
        self.counts.forced += self.level != self._last
        self._go_to(self._last if fits is None else fits)
        while (self._generating or self._reading) and self.needed_bytes(self.level) > self.budget_bytes:
            self._evict()

    def _go_to(self, level: int) -> None:
        if level == self.level:
            return
        self.now += self.table.switching_seconds(self.level, level)
        for job in self._generating:
            self._settle(job)
            job.worst_level = max(job.worst_level, level)
        for job in self._reading:
            job.worst_level = max(job.worst_level, level)
        self.level, self.switched_seconds = level, self.now
        self.counts.switches += 1

    def _settle(self, job: Job) -> None:
        fresh = self._count - job.settled_at
        job.produced += fresh
        job.quality += fresh * self._quality[job.worst_level]
        job.settled_at = self._count

    def _evict(self) -> None:
        """The last that came in gives its cache up."""
        if self._reading:
            job = self._reading.pop()
        else:
            job = self._generating.pop()
            self._settle(job)
            self._cached_tokens -= job.cached_tokens
        self.reserved_tokens -= job.length
        job.unread_tokens = job.prompt_tokens + job.produced
        self.waiting.appendleft(job)
        self.counts.evictions += 1

    def _let_in(self) -> None:
        room = self.table.max_batch - self.n_running
        fixed, kv = self._fixed[self.level], self._kv[self.level]
        while room and self.waiting:
            tokens = self.reserved_tokens + self.waiting[0].length
            if fixed + kv * tokens > self.budget_bytes:
                return
            job = self.waiting.popleft().copied()
            job.worst_level = self.level
            self.reserved_tokens = tokens
            self._reading.append(job)
            room -= 1

    def _refuse(self) -> None:
        """Refuses what has waited for too long; nothing is in flight, so nothing that waits could be let in."""
        self._short_since = min(self._short_since, self.now) if self.waiting else _NEVER
        latest = self.now - self.targets.patience_seconds + _ROUNDING_SECONDS
        if self._short_since <= latest:
            for job in [job for job in self.waiting if job.arrived_seconds <= latest]:
                self.waiting.remove(job)
                self.counts.refused += 1
                self.counts.refused_tokens += job.generated_tokens

    def _read_step(self) -> None:
        """One step with prompts in it."""
        n_generating = len(self._generating)
        room, read, began = self.table.read_tokens - n_generating, 0, []
        self._cached_tokens += n_generating
        attended = self._cached_tokens
        for job in self._reading:
            if not (taken := min(job.unread_tokens, room - read)):
                break
            job.unread_tokens -= taken
            read += taken
            attended += job.prompt_tokens + job.produced - job.unread_tokens
            if not job.unread_tokens:
                began.append(job)
        self.now += self.table.step_seconds(self.level, read, n_generating, attended)
        self._count += 1
        self.counts.steps += 1
        self.counts.generated_tokens += n_generating + len(began)
        for job in began:  # each has its next token now
            job.first_seconds = self.now if job.first_seconds is None else job.first_seconds
            job.produced += 1
            job.quality += self._quality[job.worst_level]
            job.settled_at = self._count
            self._cached_tokens += job.cached_tokens
            job.ends_at = self._count + job.generated_tokens - job.produced
        self._reading = self._reading[len(began) :]
        self._generating += began
        self._end_finished()

    def _generate_until(self, event_seconds: float) -> None:
        """Steps in which all in flight generate, until one of them ends or something happens."""
        row, table, n = self.table.levels[self.level], self.table, len(self._generating)
        own_seconds = row.base_seconds + row.sequence_seconds * n
        cached, now, count = self._cached_tokens, self.now, self._count
        began, ends = count, min(job.ends_at for job in self._generating)
        while count < ends and now < event_seconds:
            cached += n
            count += 1
            now += own_seconds + table.cached_token_seconds * cached
        self._cached_tokens, self.now, self._count = cached, now, count
        self.counts.steps += count - began
        self.counts.generated_tokens += (count - began) * n
        if count == ends:
            self._end_finished()

    def _end_finished(self) -> None:
        ended = [job for job in self._generating if job.ends_at <= self._count]
        if not ended:
            return
        self._generating = [job for job in self._generating if job.ends_at > self._count]
        for job in ended:
            self._settle(job)
            self.reserved_tokens -= job.length
            self._cached_tokens -= job.cached_tokens
            self.counts.served += 1
            further = max(1, job.generated_tokens - 1)
            in_time = (
                job.first_seconds - job.arrived_seconds <= self.targets.first_token_seconds
                and (self.now - job.first_seconds) / further <= self.targets.token_seconds
            )
            if in_time:
                self.counts.in_time += 1
                self.counts.quality_tokens += job.quality
