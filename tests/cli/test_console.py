"""What long work says without a terminal."""

from __future__ import annotations

import time

from sparsify.cli import console


def test_a_line_now_and_then(monkeypatch, capsys):
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    with console.RichProgress().task("training [masked]", 100) as advance:
        for step in range(50):
            clock += 2
            advance()
            if step == 7:
                advance(0, text="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training [masked]: 15 of 100, after 30 s, about 3 min left; loss 1.5"
    assert [line.split()[2] for line in lines] == ["15", "30", "45"]


def test_a_total_known_late_or_never(monkeypatch, capsys):
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    with console.RichProgress().task("reading") as advance:
        clock += 100
        advance(5)
        clock += 100
        advance(5, total=20)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 5, after 2 min",
        "reading: 10 of 20, after 3 min, about 3 min left",
    ]


def test_short_work_says_nothing(capsys):
    with console.RichProgress().task("short", 3) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err == ""


def test_durations():
    assert [console.duration(seconds) for seconds in (0.1, 89, 120, 5400)] == [
        "1 s",
        "89 s",
        "2 min",
        "1.5 h",
    ]
