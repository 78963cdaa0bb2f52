"""Fixed patterns: masks that no weight decides, for training from scratch and as a yardstick for the other pruners.

A pattern is an *order* in which the blocks of a grid are taken. A mask of any density is the beginning of that order,
so it is exact, a sparser mask lies inside every denser one, and any allocation over layers can be met. The order starts
with `max(R, C)` blocks that reach every row and every column, so that none is empty from that density on; of these the
first `min(R, C)` share no row and no column.

    mask = pattern_mask("watts_strogatz", (4096, 1024), BlockShape(64, 64), sparsity=0.9, rewire=0.2)
    layer = BlockSparseLinear(1024, 4096, mask.block, mask)
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsify.allocation.budget import allocate
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import BlockShapeError, PrunerError
from sparsify.pruner import PrunableLayer, Pruner, create_pruner


class Pattern(Pruner):
    """A pruner that looks at nothing but the size of the grid; derived classes define `order`.

    Args:
        seed: Seed of everything random. Layers differ by their names, and are the same in every run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @abstractmethod
    def order(self, rows: int, cols: int, rng: random.Random) -> Tensor:
        """Every block of a grid once, in the order in which they are taken.

        Args:
            rows: Rows `R` of the grid, at least as many as columns; a wide grid is handed over transposed.
            cols: Columns `C` of the grid.
            rng: The only source of randomness.

        Returns:
            `(R * C,)` int64 on the CPU: `row * C + col`.
        """

    def score(self, layer: PrunableLayer) -> Tensor:
        """`1 - position in the order / blocks`, `(R, C)` float64 on the CPU: layers compare by the share taken."""
        rows, cols = layer.grid
        wide = rows < cols
        # A string seeds alike on every platform and in every process, other objects' hashes do not.
        rng = random.Random(f"{self.seed}/{layer.name}")
        order = self.order(max(rows, cols), min(rows, cols), rng)
        score = torch.empty(rows * cols, dtype=torch.float64)
        score[order] = 1.0 - torch.arange(rows * cols, dtype=torch.float64) / (rows * cols)
        return score.view(cols, rows).t() if wide else score.view(rows, cols)


def pattern_mask(
    method: str, shape: tuple[int, int], block: BlockShape, sparsity: float, name: str = "", **options: object
) -> BlockMask:
    """The mask of a pattern for one weight.

    Args:
        method: Name of a pattern, such as `"watts_strogatz"`.
        shape: The weight's `(N, K)` = `(out_features, in_features)`.
        block: Block shape `(bo, bi)`.
        sparsity: Share of the elements to leave out, at least 0 and below 1; met within half a block.
        name: The layer's name; layers of different names get different random masks.
        **options: Options of the pattern, such as `seed`.

    Raises:
        PrunerError: If there is no such pattern, or it refuses an option.
        ConfigError: If the sparsity is out of range.
    """
    pattern = create_pruner(method, **options)
    if not isinstance(pattern, Pattern):
        raise PrunerError(f"{method!r} is not a pattern: it needs weights to score, name one that does not")
    weight = nn.Parameter(torch.empty(shape, device="meta"))
    layer = PrunableLayer(name, name, weight, block)
    return allocate({name: pattern.score(layer)}, [layer], sparsity, "layer")[name]


def layers_to_mix(masks: Iterable[BlockMask], limit: int = 64) -> int | None:
    """The mixing metric: how many layers it takes until every input reaches every output.

    Args:
        masks: Masks of layers that follow each other, first layer first; may be endless.
        limit: Layers to look at.

    Returns:
        The smallest number of layers whose product has no zero, or `None` if `limit` layers or all do not suffice.

    Raises:
        BlockShapeError: If a layer takes another number of features than the one before gives.
    """
    # Which of the first layer's input blocks each feature depends on, (features, input blocks).
    reached: Tensor | None = None
    for count, mask in enumerate(masks, 1):
        if count > limit:
            return None
        features = mask.shape[1]
        if reached is None:
            groups = torch.eye(mask.keep.shape[1])
        elif reached.shape[0] != features:
            raise BlockShapeError(
                f"layer {count} takes {features} features, the layer before gives {reached.shape[0]}: "
                f"masks must be of layers that follow each other"
            )
        else:
            groups = torch.stack([part.amax(0) for part in reached.split(mask.block.cols)])
        joined = (mask.keep.cpu().float() @ groups > 0).float()
        if bool(joined.all()):
            return count
        reached = joined.repeat_interleave(mask.block.rows, 0)[: mask.shape[0]]
    return None


def permutation(count: int, rng: random.Random) -> Tensor:
    """The numbers below `count` in random order, `(count,)` int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(rng.getrandbits(63)))


def diagonal(rows: int, cols: int) -> Tensor:
    """The column nearest to the grid's stretched diagonal in each row, `(R,)` int64; every column where `R >= C`."""
    return (2 * torch.arange(rows) + 1) * cols // (2 * rows)


def spread(columns: Tensor) -> Tensor:
    """Order of rows that takes one row of every column, then a second of every column, ...; `columns` ascends."""
    repeat = torch.arange(len(columns)) - torch.searchsorted(columns, columns)
    return repeat.argsort(stable=True)


def starting_with(first: Tensor, others: Tensor) -> Tensor:
    """`first`, then those of `others` that are not in it; all blocks of a grid, `(R * C,)`."""
    taken = torch.zeros(len(others), dtype=torch.bool)
    taken[first] = True
    return torch.cat([first, others[~taken[others]]])
