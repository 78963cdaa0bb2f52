"""Scale-free small worlds: blocks that grow by preferential attachment, with hubs that reach nearly everything.

Barabasi & Albert, "Emergence of Scaling in Random Networks" (1999), between the rows and the columns of a grid: they
arrive one after the other in random order, each with one link to its partner on the diagonal of that order, and each
arrival links to m older ones on the other side, chosen with a probability proportional to the links that these have.
The degrees of rows and of columns both get a heavy tail.

For an order of all blocks the m links are handed out in rounds: every arrival its first, then every arrival its
second, ... Each block is thereby the choice of the younger of its two ends. One that has linked to all that are older
is passed over.
"""

from __future__ import annotations

import random
from bisect import bisect
from itertools import accumulate

import torch
from torch import Tensor

from sparsify.patterns import Pattern, diagonal, permutation, spread

TRIES = 16


class BarabasiAlbert(Pattern):
    """Keeps a scale-free network of blocks, grown by preferential attachment: few rows and columns are hubs."""

    name = "barabasi_albert"

    def order(self, rows: int, cols: int, rng: random.Random) -> Tensor:
        """The arrivals' links to their partners, then round after round one link of each."""
        center = diagonal(rows, cols)
        partner = center.tolist()
        first_row = torch.searchsorted(center, torch.arange(cols)).tolist()  # with it a column arrives
        to_rows, to_cols = _Side(rows, range(rows)), _Side(cols, partner)
        taken = [(row, partner[row]) for row in spread(center).tolist()]
        linked = set(taken)
        arrivals = [(row, partner[row], first_row[partner[row]] == row) for row in range(rows)]
        while len(taken) < rows * cols:
            for row, col, new in arrivals:
                link = to_cols.choose(col, lambda other, row=row: (row, other) in linked, rng)
                links = [] if link is None else [(row, link)]
                if new:
                    link = to_rows.choose(row, lambda other, col=col: (other, col) in linked, rng)
                    links += [] if link is None else [(link, col)]
                for link in links:
                    to_rows.add(link[0])
                    to_cols.add(link[1])
                linked.update(links)
                taken += links
        # Arrival was in order of number; where in the grid it was is random.
        row, col = torch.tensor(taken).unbind(1)
        return permutation(rows, rng)[row] * cols + permutation(cols, rng)[col]


class _Side:
    """The rows, or the columns, with the number of links that each has."""

    def __init__(self, count: int, linked: range | list[int]) -> None:
        self.degree = [0] * count
        self.ends: list[int] = []  # one entry a link: a draw from it is a draw in proportion to degree
        for member in linked:
            self.add(member)

    def add(self, member: int) -> None:
        self.degree[member] += 1
        self.ends.append(member)

    def choose(self, older_than: int, is_linked, rng: random.Random) -> int | None:
        """One of the first `older_than` members that is not linked, by degree; `None` if all of them are."""
        for _ in range(TRIES):
            member = self.ends[int(rng.random() * len(self.ends))]
            if member < older_than and not is_linked(member):
                return member
        free = [member for member in range(older_than) if not is_linked(member)]
        if not free:
            return None
        total = list(accumulate(self.degree[member] for member in free))
        return free[bisect(total, rng.random() * total[-1])]
