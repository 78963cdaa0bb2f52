"""Dividing units of work among ranks by what they cost, not by how many they are."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate, pairwise


def balanced(costs: Sequence[float], ranks: int, *, equal_counts: bool = False) -> list[list[int]]:
    """Units of each rank, in ascending order: the costliest unit first, always to the rank with the least so far.

    No rank then has more than 4/3 of what the best division would give it (Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969). Equal costs end in equal numbers of units. Ties go to the lower rank, so that every process
    comes to the same division.

    Args:
        costs: What each unit costs, at least `ranks` of them.
        ranks: Number of parts; none is left empty.
        equal_counts: Give every rank the same number of units, but for a remainder of one.

    Raises:
        ValueError: If there are fewer units than ranks.
    """
    _check(costs, ranks)
    share, longer = divmod(len(costs), ranks)
    parts: list[list[int]] = [[] for _ in range(ranks)]
    waiting: list[tuple[float, int, int]] = [(0.0, 0, rank) for rank in range(ranks)]
    order = sorted(range(len(costs)), key=lambda unit: (-costs[unit], unit))
    for done, unit in enumerate(order):
        empty = sum(not part for part in parts)
        # The last units go to those that have none: many may cost nothing.
        if empty == len(costs) - done:
            waiting = [entry for entry in waiting if not parts[entry[2]]]
            heapq.heapify(waiting)
        total, count, rank = heapq.heappop(waiting)
        parts[rank].append(unit)
        count += 1
        if equal_counts and count >= share:
            if count > share or not longer:
                continue
            longer -= 1
        heapq.heappush(waiting, (total + costs[unit], count, rank))
    return [sorted(part) for part in parts]


def contiguous(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Units of each rank as runs of neighbours, cut where the sum of costs is nearest to an equal share.

    Args:
        costs: What each unit costs, at least `ranks` of them.
        ranks: Number of parts; none is left empty.

    Raises:
        ValueError: If there are fewer units than ranks.
    """
    _check(costs, ranks)
    sums = [0.0, *accumulate(costs)]
    if not sums[-1]:
        sums = [float(unit) for unit in range(len(costs) + 1)]
    cuts = [0]
    for rank in range(1, ranks):
        wanted = sums[-1] * rank / ranks
        allowed = range(cuts[-1] + 1, len(costs) - (ranks - rank) + 1)
        cuts.append(min(allowed, key=lambda cut: (abs(sums[cut] - wanted), cut)))
    cuts.append(len(costs))
    return [list(range(start, end)) for start, end in pairwise(cuts)]


def _check(costs: Sequence[float], ranks: int) -> None:
    if len(costs) < ranks:
        raise ValueError(f"{len(costs)} units cannot be divided among {ranks} ranks")
