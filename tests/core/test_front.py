"""Fronts of quality and speed, and the choice on them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.sweep import front
from sparsify.sweep.front import Trade


def trades(*pairs: tuple[float, float]) -> list[Trade]:
    return [Trade(speedup, cost, cost) for speedup, cost in pairs]


numbers = st.tuples(st.floats(0.3, 8.0), st.floats(-5.0, 60.0))


@given(st.lists(numbers, max_size=12))
def test_nothing_on_the_front_is_beaten_and_everything_else_is(pairs):
    found = trades(*pairs)
    on = front.front(found)
    assert [found[i].speedup for i in on] == sorted(found[i].speedup for i in on)
    for index, one in enumerate(found):
        faster = one.speedup > 1 + front.TIE
        beaten = any(
            other.speedup >= one.speedup and other.cost <= one.cost
            and (other.speedup, other.cost) != (one.speedup, one.cost)
            for other in found
        )  # fmt: skip
        same = any(found[i] == one for i in on)
        assert same if faster and not beaten else index not in on


@given(st.lists(numbers, min_size=1, max_size=12), st.floats(0, 60))
def test_the_fastest_within_the_allowed_loss(pairs, most):
    found = trades(*pairs)
    chosen = front.best(found, most)
    allowed = [t.speedup for t in found if t.loss <= most and t.speedup > 1 + front.TIE]
    assert (chosen is None) == (not allowed)
    if chosen is not None:
        assert found[chosen].speedup == max(allowed) and found[chosen].loss <= most


def test_the_knee_is_where_losing_more_no_longer_pays():
    found = trades((1.2, 0.2), (1.8, 1.0), (2.4, 9.0), (3.0, 30.0), (1.7, 8.0), (0.9, 0.0))
    # (x, y) of the front, scaled: 0.1 - 0.007, 0.4 - 0.03, 0.7 - 0.3, 1 - 1.
    assert front.front(found) == [0, 1, 2, 3]
    assert front.best(found) == 2
    found[2] = Trade(2.0, 9.0, 9.0)
    assert front.best(found) == 1


def test_a_front_below_the_line_has_no_knee():
    assert front.best(trades((1.1, 20.0), (2.0, 21.0))) is None
    assert front.best(trades((2.0, 5.0))) is None
    assert front.best(trades((2.0, 5.0)), 5.0) == 0


def test_what_costs_nothing_is_taken():
    assert front.best(trades((1.5, 0.0), (1.3, -0.2))) == 0
    assert front.best(trades((1.01, 0.0), (0.5, -1.0))) is None
    assert front.best([]) is None


def test_points_are_points_and_perplexity_is_per_cent():
    assert front.trade(2.0, "spearman", 84.0, 86.5) == Trade(2.0, 2.5, 2.5)
    worse = front.trade(2.0, "perplexity", 30.0, 20.0)
    assert worse.loss == pytest.approx(50.0) and worse.cost == pytest.approx(math.log(1.5))
    assert front.rule(2, "perplexity") == "the fastest that loses at most 2 per cent more perplexity"
    assert "knee" in front.rule(None, "spearman")
