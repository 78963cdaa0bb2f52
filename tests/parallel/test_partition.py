"""Who gets which units."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.parallel.partition import balanced, contiguous

UNITS = st.lists(st.integers(0, 1000), min_size=8, max_size=40)


@given(UNITS, st.integers(1, 8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_unit_has_one_rank_and_no_rank_is_empty(costs: list[int], ranks: int, equal: bool):
    for parts in (balanced(costs, ranks, equal_counts=equal), contiguous(costs, ranks)):
        assert len(parts) == ranks and all(parts)
        assert all(part == sorted(part) for part in parts)
        assert sorted(unit for part in parts for unit in part) == list(range(len(costs)))


@given(UNITS, st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_equal_counts_differ_by_one_at_most(costs: list[int], ranks: int):
    counts = [len(part) for part in balanced(costs, ranks, equal_counts=True)]
    assert max(counts) - min(counts) <= 1


@given(UNITS, st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_no_rank_has_more_than_grahams_bound(costs: list[int], ranks: int):
    most = max(sum(costs[unit] for unit in part) for part in balanced(costs, ranks))
    assert most <= sum(costs) / ranks + max(costs)


def test_balances_by_cost_and_not_by_number():
    costs = [9.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert balanced(costs, 2) == [[0], list(range(1, 10))]
    assert contiguous(costs, 2) == [[0], list(range(1, 10))]
    # As many units each: the expensive one with the others that are left.
    assert [len(part) for part in balanced(costs, 2, equal_counts=True)] == [5, 5]


def test_units_without_cost_are_spread():
    assert [len(part) for part in balanced([0.0] * 6, 3)] == [2, 2, 2]
    assert contiguous([0.0] * 6, 3) == [[0, 1], [2, 3], [4, 5]]
    assert balanced([5.0, 0, 0], 3) == [[0], [1], [2]]


@pytest.mark.parametrize("divide", [balanced, contiguous])
def test_fewer_units_than_ranks_are_refused(divide):
    with pytest.raises(ValueError, match="2 units cannot be divided among 3 ranks"):
        divide([1.0, 1.0], 3)
