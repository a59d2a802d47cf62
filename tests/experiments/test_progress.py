"""Progress tells how long a phase still takes, from what was done since its units were last changed."""

from types import SimpleNamespace

from experiments.progress import phase


def test_the_estimate_starts_again_where_the_units_change(monkeypatch, capsys):
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("rich.console.monotonic", lambda: clock.seconds)
    with phase("training") as advance:
        for seconds, done, total in [(0, 0, 800), (20, 400, 800), (40, 0, 100), (60, 20, 100), (80, 40, 100)]:
            clock.seconds = float(seconds)
            advance(done, total)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "training: 400/800 after 20 s, about 20 s left"
    assert said[1] == "training: 0/100 after 40 s", "tokens of a ranking tell nothing of environment steps"
    assert said[2:] == ["training: 20/100 after 60 s, about 80 s left", "training: 40/100 after 80 s, about 60 s left"]
