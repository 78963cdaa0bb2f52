"""Banded masks: the blocks nearest to the diagonal, stretched from corner to corner of a rectangular grid.

The regular graph at one end of the small-world model: neighbours share their inputs, and information crosses the layer
only by the width of the band at a time.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sparsify.patterns import Pattern, diagonal, spread, starting_with

GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 spread more evenly than those of any other number


class Banded(Pattern):
    """Keeps a band of blocks along the diagonal; nothing about it is random."""

    name = "banded"

    def __init__(self) -> None:
        super().__init__()

    def order(self, rows: int, cols: int, rng: random.Random) -> Tensor:
        """The diagonal, then by distance `|(i + 1/2) / R - (j + 1/2) / C|` from it."""
        center = diagonal(rows, cols)
        cover = (torch.arange(rows) * cols + center)[spread(center)]
        # In integers, so that equal distances are equal; rows far from each other then take turns.
        down, across = (2 * torch.arange(rows) + 1) * cols, (2 * torch.arange(cols) + 1) * rows
        distance = (down[:, None] - across[None]).abs()
        turn = (torch.arange(rows, dtype=torch.float64) * GOLDEN % 1.0).argsort()
        nearest = distance[turn].flatten().argsort(stable=True)
        return starting_with(cover, turn[nearest // cols] * cols + nearest % cols)
