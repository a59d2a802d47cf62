"""The simulated queue: by hand, and what holds whatever is decided."""

import math

import numpy as np
import pytest

from rap_env.errors import InvalidConfig
from rap_env.serving.episodes import Setting, draw_episode
from rap_env.serving.jobs import Targets
from rap_env.serving.simulated import Simulation
from rap_env.serving.tables import embedded_table
from tests.serving.cases import TABLE, WHOLE_BYTES, episode

PATIENT = Targets(first_token_seconds=50.0, token_seconds=50.0, patience_seconds=10.0)


def simulation(*arrivals, targets=PATIENT, **settings) -> Simulation:
    return Simulation(TABLE, episode(*arrivals, **settings), WHOLE_BYTES, targets)


def test_one_request_by_hand():
    one = simulation((0.0, 10, 3))
    one.advance(0, 0.1)  # reads the prompt, whose last token gives the first new one
    assert one.now == pytest.approx(1.0 + 10 * 0.01 + 10 * 0.001)
    assert one.counts.generated_tokens == 1 and one.reserved_tokens == 13
    one.advance(0, 100.0)  # two more steps of one sequence, which attend to 11 and 12 tokens
    assert one.counts.served == one.counts.in_time == 1 and one.counts.steps == 3
    assert one.counts.quality_tokens == pytest.approx(3.0)
    assert one.now == 100.0 and one.reserved_tokens == 0 and one._cached_tokens == 0


def test_two_requests_and_a_switch_by_hand():
    one = simulation((0.0, 90, 4), (0.5, 30, 2), shares=((0.0, 2.0),))
    one.advance(0, 0.1)
    first = 1.0 + 90 * 0.01 + 90 * 0.001
    assert one.now == pytest.approx(first) and len(one.waiting) == 1
    one.advance(1, one.now + 0.1)  # 0.75 s of switching are over the time, so no step
    assert one.now == pytest.approx(first + 0.75) and one.counts.switches == 1 and one.counts.steps == 1
    one.advance(1, one.now + 0.1)  # 1 token generating, attending to 91, and a prompt of 30
    second = first + 0.75 + 0.5 + 30 * 0.01 + 0.1 + (91 + 30) * 0.001
    assert one.now == pytest.approx(second) and one.counts.generated_tokens == 3
    one.advance(1, one.now + 0.1)  # both generate: 92 and 31; the second one ends
    third = second + 0.5 + 2 * 0.1 + (92 + 31) * 0.001
    assert one.now == pytest.approx(third) and one.counts.served == 1
    one.advance(1, one.now + 0.1)
    assert one.now == pytest.approx(third + 0.5 + 0.1 + 93 * 0.001) and one.counts.served == 2
    assert one.counts.quality_tokens == pytest.approx((1.0 + 3 * 0.5) + 2 * 0.5)
    assert one._cached_tokens == one.reserved_tokens == 0


def test_a_sequence_counts_with_the_smallest_level_that_it_was_in_flight_with():
    one = simulation((0.0, 10, 4))
    for level in (0, 1, 1, 0, 0, 0):
        one.advance(level, one.now + 0.01)
    one.advance(0, 100.0)
    assert one.counts.quality_tokens == pytest.approx(1.0 + 3 * 0.5)


def test_prompts_are_read_in_pieces_beside_what_generates():
    one = simulation((0.0, 40, 9), (0.0, 250, 1), shares=((0.0, 3.0),))
    one.advance(0, 0.1)
    assert [job.unread_tokens for job in one.running] == [0, 190]  # 100 tokens a step
    one.advance(0, one.now + 0.1)
    assert [job.unread_tokens for job in one.running] == [0, 91]  # one of them was the generating sequence's
    one.advance(0, one.now + 0.1)
    assert one.counts.served == 1 and one.n_running == 1


def test_a_budget_that_falls_forces_a_smaller_level_then_evicts_then_refuses():
    one = simulation((0.0, 20, 20), (0.0, 20, 20), shares=((0.0, 1.0), (2.0, 0.6), (6.0, 0.525), (9.0, 0.1)))
    one.advance(0, 1.0)
    assert one.needed_bytes(0) == 1150 + 800 == one.needed_bytes(one.level) and one.n_running == 2
    one.advance(0, 4.0)  # 1200 bytes: neither level holds 80 tokens, the smaller one holds one sequence
    assert (one.level, one.counts.forced, one.counts.evictions, one.n_running) == (1, 1, 1, 1)
    one.advance(1, 7.0)  # 1050 bytes hold one sequence, just so
    assert one.n_running == 1 and one.needed_bytes(1) == 1050 == one.budget_bytes
    assert one.counts.fullest == 1.0
    one.advance(1, 100.0)  # 200 bytes hold nothing
    assert one.n_running == 0 and not one.waiting
    assert one.counts.refused == 2 and one.counts.refused_tokens == 40 and one.counts.served == 0


def test_what_was_evicted_is_read_again_with_what_it_had_generated():
    one = simulation((0.0, 10, 5), shares=((0.0, 1.0), (3.0, 0.1), (9.0, 1.0)))
    one.advance(0, 3.0)
    produced = one.counts.generated_tokens
    one.advance(0, 4.5)
    assert one.n_running == 0 and one.waiting[0].unread_tokens == 10 + produced
    one.advance(0, 50.0)
    assert one.counts.served == 1 and one.counts.generated_tokens == 5 and one.counts.evictions == 1


def test_late_requests_count_as_served_but_not_as_in_time():
    slow_start = simulation((0.0, 10, 3), targets=Targets(1.0, 50.0, 10.0))
    slow_tokens = simulation((0.0, 10, 3), targets=Targets(50.0, 1.0, 10.0))
    for one in (slow_start, slow_tokens):
        one.advance(0, 100.0)
        assert (one.counts.served, one.counts.in_time, one.counts.quality_tokens) == (1, 0, 0.0)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_decided_no_request_is_lost_and_no_budget_is_exceeded(seed):
    table = embedded_table()
    setting = Setting(duration_seconds=30.0, requests_per_second=(0.5, 3.0), memory_shares=(0.1, 0.9))
    drawn, rng = draw_episode(seed, setting), np.random.default_rng(seed)
    one = Simulation(table, drawn, table.needed_bytes(0, setting.whole_tokens), Targets())
    while one.now < drawn.duration_seconds:
        until = one.now + 0.25
        one.advance(int(rng.integers(len(table.levels))), until)
        assert one.now >= until
        counts = one.counts
        assert counts.arrived == counts.served + counts.refused + one.n_running + len(one.waiting)
        assert counts.fullest <= 1.0 and one.n_running <= table.max_batch
        assert one.reserved_tokens == sum(job.length for job in one.running)
        assert 0 <= one.pending_quality + counts.quality_tokens <= counts.generated_tokens + 1e-9
    assert counts.arrived == sum(arrival.seconds <= one.now for arrival in drawn.arrivals)


def test_a_switch_that_takes_longer_than_a_decision_does_not_turn_time_back():
    one = simulation((5.0, 10, 3), shares=((0.0, 1.0), (0.05, 0.5)))
    one.advance(0, 0.1)  # idle; the budget falls, and the switch takes 0.75 s
    assert one.level == 1 and one.now == one.switched_seconds == pytest.approx(0.05 + 0.75)


def test_a_clone_lives_the_same_life_and_leaves_the_other_alone():
    table = embedded_table()
    drawn = draw_episode(3, Setting(duration_seconds=20.0))
    one = Simulation(table, drawn, table.needed_bytes(0, 4096), Targets())
    one.advance(2, 5.0)
    other, before = one.clone(), vars(one.counts).copy()
    other.advance(6, 20.0)
    assert vars(one.counts) == before
    twin = one.clone()
    twin.advance(6, 20.0)
    assert vars(twin.counts) == vars(other.counts) and twin.now == other.now


def test_episodes_are_those_of_their_seed_and_as_the_setting_says():
    setting = Setting()
    assert draw_episode(5, setting) == draw_episode(5, setting) != draw_episode(6, setting)
    for seed in range(20):
        drawn = draw_episode(seed, setting)
        assert all(
            0.0 <= a.seconds < 60.0 and a.prompt_tokens <= 768 and a.generated_tokens <= 96 for a in drawn.arrivals
        )
        assert all(0.4 <= share <= 1.0 for share in drawn.memory.shares)
        assert drawn.offered_tokens == sum(arrival.generated_tokens for arrival in drawn.arrivals) > 0


def test_settings_and_targets_that_can_not_be_are_refused():
    for changes in (
        {"duration_seconds": 0.0},
        {"length_scale": math.inf},
        {"whole_tokens": 0},
        {"requests_per_second": (0.0, 1.0)},
        {"memory_shares": (0.9, 0.5)},
    ):
        with pytest.raises(InvalidConfig, match=next(iter(changes))):
            Setting(**changes)
    with pytest.raises(InvalidConfig, match="token_seconds: expected more than 0; got nan"):
        Targets(token_seconds=math.nan)


@pytest.mark.parametrize(
    ("arrivals", "seconds", "says"),
    [
        ([(1.0, 5, 5), (0.5, 5, 5)], 9.0, "arrivals in the order of time; got 0.5 s after 1.0 s"),
        ([(-1.0, 5, 5)], 9.0, "arrivals in the order of time"),
        ([(math.nan, 5, 5)], 9.0, "arrivals in the order of time"),
        ([(0.0, 0, 5)], 9.0, "at least one token to read"),
        ([(0.0, 5, 0)], 9.0, "at least one token to read"),
        ([(0.0, 5, 5)], 0.0, "duration_seconds: expected a positive number; got 0"),
    ],
)
def test_episodes_that_can_not_be_are_refused(arrivals, seconds, says):
    with pytest.raises(InvalidConfig, match=says):
        episode(*arrivals, seconds=seconds)


def test_no_memory_at_all_refuses_everything():
    one = simulation((0.0, 10, 3), (1.0, 10, 3), shares=((0.0, 0.0),))
    one.advance(0, 50.0)
    assert one.counts.refused == 2 and one.counts.steps == 0 and one.now == 50.0


def test_patience_counts_from_when_nothing_could_be_served():
    one = simulation((0.0, 10, 8), shares=((0.0, 1.0), (6.0, 0.1)))
    one.advance(0, 5.0)
    assert one.n_running == 1
    short_since = one.counts.steps  # steps of 1.1 s and a little: evicted at the end of the sixth
    one.advance(1, 16.0)
    assert one.counts.refused == 0 and len(one.waiting) == 1 and short_since == 5
    one.advance(1, 18.0)
    assert one.counts.refused == 1
