"""Balanced random blocks: every row keeps the same number of blocks, and so does every column.

A random graph of equal degrees (the configuration model; Wormald, "Models of random regular graphs", 1999), built as a
union of matchings: in each round every row gets one more column, such that no column is given twice among the same
C rows. C rounds make a random Latin square of those C rows. Matchings are grown by augmenting paths (Berge 1957) from
a random start; the blocks left of a C-regular graph always hold another one.

Rows end within one block of each other, columns too where the longer side is a multiple of the shorter one, else
within two.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sparsify.patterns import Pattern, permutation


class BalancedRandom(Pattern):
    """Keeps random blocks, the same number of them in every row and in every column."""

    name = "balanced_random"

    def order(self, rows: int, cols: int, rng: random.Random) -> Tensor:
        """One block of every row in each round, spread evenly over the columns."""
        squares = [_latin_square(cols, rng) for _ in range(rows // cols)]
        if rest := rows % cols:
            shifted = torch.arange(rest)[None] * cols // rest + torch.arange(cols)[:, None]
            squares.append(permutation(cols, rng)[shifted % cols])
        columns = torch.cat(squares, 1)  # (rounds, rows)
        place = permutation(rows, rng)
        return (place * cols + columns).flatten()


def _latin_square(size: int, rng: random.Random) -> Tensor:
    """For each round and row a column; all rows of a round, and all rounds of a row, have different ones."""
    free = [permutation(size, rng).tolist() for _ in range(size)]
    rounds = []
    for _ in range(size):
        rounds.append(_matching(free, permutation(size, rng).tolist()))
        for row, column in enumerate(rounds[-1]):
            free[row].remove(column)
    return torch.tensor(rounds)


def _matching(free: list[list[int]], rows: list[int]) -> list[int]:
    """Gives each row one of its free columns, all different; `rows` is the order in which they choose."""
    column_of, owner = [-1] * len(rows), [-1] * len(rows)
    for row in rows:
        column, asked_by = _free_column(row, free, owner)
        while column != -1:  # each row on the path hands its column on, back to the row that had none
            asking = asked_by[column]
            owner[column] = asking
            column_of[asking], column = column, column_of[asking]
    return column_of


def _free_column(row: int, free: list[list[int]], owner: list[int]) -> tuple[int, dict[int, int]]:
    """Nearest column without an owner on a path of free and owned columns, and which row asked for each column."""
    asked_by: dict[int, int] = {}
    asking = [row]
    for current in asking:
        for column in free[current]:
            if column not in asked_by:
                asked_by[column] = current
                if owner[column] == -1:
                    return column, asked_by
                asking.append(owner[column])
    raise AssertionError("a regular bipartite graph has a perfect matching")
