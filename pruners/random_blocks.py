"""Random blocks: each block of the grid is as likely to be kept as any other.

The Erdos-Renyi graph `G(n, m)` (Erdos & Renyi, "On the Evolution of Random Graphs", 1960) between input and output
blocks, after a random matching that leaves no row and no column empty.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sparsify.patterns import Pattern, permutation, starting_with


class RandomBlocks(Pattern):
    """Keeps blocks drawn at random, without looking at the weights."""

    name = "random_blocks"

    def order(self, rows: int, cols: int, rng: random.Random) -> Tensor:
        """A random matching, then all other blocks shuffled."""
        cover = permutation(rows, rng) * cols + permutation(cols, rng)[torch.arange(rows) % cols]
        return starting_with(cover, permutation(rows * cols, rng))
