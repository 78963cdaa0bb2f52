"""Small worlds: a ring lattice of blocks with a share of its links rewired at random.

Watts & Strogatz, "Collective dynamics of 'small-world' networks" (1998). Row i starts with links to the columns nearest
to it on a ring. The procedure goes round the ring once for the nearest neighbours, again for the second nearest, and so
on, and moves each link with probability `rewire` to a random column that row i has no link to. At 0 this is a band that
closes on itself, at 1 random; in between, few long links make paths short while neighbours still share neighbours.

Stopped after n links the procedure has made the small world of n blocks, which is what makes it an order. A link whose
place a rewired one already took is rewired too. The links of each row to itself stay, so that no column is empty.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sparsify.errors import PrunerError
from sparsify.patterns import Pattern, diagonal, permutation, spread


class WattsStrogatz(Pattern):
    """Keeps a small world of blocks: a closed band with some of its blocks moved at random.

    Args:
        rewire: Probability that a block of the band moves, 0 to 1.
        seed: Seed of everything random.

    Raises:
        PrunerError: If `rewire` is out of range.
    """

    name = "watts_strogatz"

    def __init__(self, rewire: float = 0.1, seed: int = 0) -> None:
        if not 0.0 <= rewire <= 1.0:
            raise PrunerError(f"rewire {rewire} is out of range: it is a probability, from 0 to 1")
        super().__init__(seed)
        self.rewire = rewire

    def order(self, rows: int, cols: int, rng: random.Random) -> Tensor:
        """The diagonal, then one link of every row in each round, nearest columns first."""
        draw = torch.Generator().manual_seed(rng.getrandbits(63))
        center, every_row = diagonal(rows, cols), torch.arange(rows)
        free = torch.ones(rows, cols, dtype=torch.bool)
        free[every_row, center] = False
        # A random column is the free one that a row likes best.
        liking = torch.rand(rows, cols, generator=draw)
        taken = [(every_row * cols + center)[spread(center)]]
        for turn in range(1, cols):
            away = (turn + 1) // 2 if turn % 2 else -(turn // 2)  # 1, -1, 2, -2, ...
            column = (center + away) % cols
            moved = torch.rand(rows, generator=draw) < self.rewire
            moved |= ~free[every_row, column]
            column[moved] = torch.where(free[moved], liking[moved], -1.0).argmax(1)
            free[every_row, column] = False
            taken.append((every_row * cols + column)[permutation(rows, rng)])
        return torch.cat(taken)
