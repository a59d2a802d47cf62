"""Writers that are killed lose nothing that they finished, and nobody measures what a living one measures."""

from experiments import kills


def test_nothing_is_lost_or_measured_twice_while_writers_are_killed(location):
    counts = kills.survive(location, n_writers=4, kills=6)
    assert (counts["lost"], counts["measured_twice"]) == (0, 0)
    assert counts["finished"] > 10 and counts["begun_again"] > 0


def test_what_is_lost_or_measured_twice_would_be_counted(store):
    for number in range(4):
        store.put(kills.identity(number), {"value": number / 7, "by": 10})
    both = (("begun", 0.0), ("stored", 0.5))
    events = [[event, number, 10, number + at] for number in range(5) for event, at in both]
    assert kills._counted(events, {}, store) == {"finished": 5, "lost": 1, "measured_twice": 0, "begun_again": 0}
    late, meanwhile, after_death = ["begun", 1, 11, 9.0], ["begun", 2, 11, 2.2], ["begun", 6, 11, 7.0]
    counts = kills._counted([*events, late, meanwhile, ["begun", 6, 12, 6.0], after_death], {12: 6.5}, store)
    assert counts == {"finished": 5, "lost": 1, "measured_twice": 2, "begun_again": 3}
