"""The vocabulary of everything else: block shapes, block masks, and the padding between them and a weight.

A weight is `(N, K)` = `(out_features, in_features)`. A block shape `(bo, bi)` divides it into a grid of
`(R, C)` = `(ceil(N / bo), ceil(K / bi))` blocks; blocks at the lower and right edge may stick out of the weight
and are zero-padded there. Sparsity and density count the weight's own elements, never the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsify.errors import BlockShapeError

MIN_SIDE, MAX_SIDE = 8, 256


@dataclass(frozen=True)
class BlockShape:
    """Size of one block as `(rows, cols)` = `(bo, bi)`, in output and input features.

    A block of a convolution whose kernel positions share their mask spans all of them: as a block of the matrix
    `(out_channels, in_channels * positions)` it has `cols = bi * positions`.

    Attributes:
        rows: Output features a block covers, `bo`; a power of two from 8 to 256.
        cols: Columns of the matrix that a block covers: input features `bi`, a power of two from 8 to 256, times
            `positions`.
        positions: Kernel positions a block spans; 1 for all but convolutions.

    Raises:
        BlockShapeError: If a side is not a power of two from 8 to 256.
    """

    rows: int
    cols: int
    positions: int = 1

    def __post_init__(self) -> None:
        channels, rest = divmod(self.cols, self.positions) if self.positions > 1 else (self.cols, 0)
        for side in (self.rows, channels):
            is_int = isinstance(side, int) and not isinstance(side, bool)
            if rest or not is_int or side < MIN_SIDE or side > MAX_SIDE or side & (side - 1):
                raise BlockShapeError(
                    f"block shape {self} is not supported: "
                    f"each side must be a power of two from {MIN_SIDE} to {MAX_SIDE}, such as 64x64 or 128x16"
                )

    @classmethod
    def parse(cls, value: BlockShape | str | int | tuple[int, int] | list[int]) -> BlockShape:
        """Reads `"64x64"`, `"64"`, `64`, `(128, 16)` or a `BlockShape`.

        Raises:
            BlockShapeError: If the value has none of these forms or a side is not supported.
        """
        if isinstance(value, BlockShape):
            return value
        sides: list[object]
        if isinstance(value, str):
            sides = [int(part) if part.strip().isdecimal() else part for part in value.lower().split("x")]
        elif isinstance(value, (tuple, list)):
            sides = list(value)
        else:
            sides = [value]
        if len(sides) == 1:
            sides = sides * 2
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise BlockShapeError(
                f"cannot read block shape {value!r}: write it as OUTxIN, such as 64x64 or 128x16"
            )
        return cls(*sides)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.rows}x{self.channels}"

    @property
    def channels(self) -> int:
        """Input features a block covers, `bi`: `cols` without the kernel positions."""
        return self.cols // self.positions if self.positions > 1 else self.cols

    def over(self, positions: int) -> BlockShape:
        """The same block over so many kernel positions."""
        return BlockShape(self.rows, self.channels * positions, positions)

    @property
    def numel(self) -> int:
        """Elements in one block."""
        return self.rows * self.cols

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Block rows and block columns `(R, C)` that cover a weight of `shape` `(N, K)`."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)


def to_blocks(weight: Tensor, block: BlockShape) -> Tensor:
    """Cuts a weight into its blocks, zero-padded at the edges.

    Args:
        weight: `(N, K)`, any dtype and device.
        block: Block shape `(bo, bi)`.

    Returns:
        `(R, C, bo, bi)`; a view of `weight` where no padding was needed.
    """
    rows, cols = block.grid((weight.shape[0], weight.shape[1]))
    pad_out, pad_in = rows * block.rows - weight.shape[0], cols * block.cols - weight.shape[1]
    if pad_out or pad_in:
        weight = torch.nn.functional.pad(weight, (0, pad_in, 0, pad_out))
    return weight.unflatten(1, (cols, block.cols)).unflatten(0, (rows, block.rows)).transpose(1, 2)


def from_blocks(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `to_blocks`: `(R, C, bo, bi)` to `(N, K)`, the padding cut off."""
    weight = blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return weight[: shape[0], : shape[1]]


def block_sizes(shape: tuple[int, int], block: BlockShape) -> Tensor:
    """Number of the weight's own elements (padding excluded) in each block, `(R, C)` int64 on the CPU."""
    rows, cols = block.grid(shape)
    heights = torch.full((rows,), block.rows)
    widths = torch.full((cols,), block.cols)
    heights[-1] = shape[0] - (rows - 1) * block.rows
    widths[-1] = shape[1] - (cols - 1) * block.cols
    return torch.outer(heights, widths)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of one weight are kept.

    Attributes:
        keep: `(R, C)` bool; `True` keeps the block.
        shape: The weight's `(N, K)` = `(out_features, in_features)`.
        block: Block shape `(bo, bi)`.

    Raises:
        BlockShapeError: If `keep` is not a bool matrix of the grid's shape.
    """

    keep: Tensor
    shape: tuple[int, int]
    block: BlockShape

    def __post_init__(self) -> None:
        grid = self.block.grid(self.shape)
        if self.keep.dtype != torch.bool or tuple(self.keep.shape) != grid:
            raise BlockShapeError(
                f"mask is {tuple(self.keep.shape)} {self.keep.dtype}: a weight of {self.shape[0]}x{self.shape[1]} "
                f"in blocks of {self.block} needs a {grid} torch.bool mask"
            )

    @classmethod
    def full(cls, shape: tuple[int, int], block: BlockShape, value: bool = True) -> BlockMask:
        """A mask that keeps every block, or none."""
        return cls(torch.full(block.grid(shape), value), shape, block)

    @classmethod
    def from_csr(cls, crow: Tensor, col: Tensor, shape: tuple[int, int], block: BlockShape) -> BlockMask:
        """Mask of the blocks that `crow_indices` `(R + 1,)` and `col_indices` `(Z,)` list (see `csr`)."""
        rows, cols = block.grid(shape)
        keep = torch.zeros(rows, cols, dtype=torch.bool, device=col.device)
        row = torch.repeat_interleave(
            torch.arange(rows, device=col.device), crow.diff().long(), output_size=col.numel()
        )
        keep[row, col.long()] = True
        return cls(keep, shape, block)

    @cached_property
    def blocks_kept(self) -> int:
        """Number of kept blocks, `Z`."""
        return int(self.keep.sum())

    @cached_property
    def elements_kept(self) -> int:
        """Number of the weight's own elements inside kept blocks."""
        return int(block_sizes(self.shape, self.block)[self.keep.cpu()].sum())

    @property
    def density(self) -> float:
        """Share of the weight's elements that is kept, 0 to 1."""
        return self.elements_kept / (self.shape[0] * self.shape[1])

    @property
    def sparsity(self) -> float:
        """`1 - density`."""
        return 1.0 - self.density

    def elements(self) -> Tensor:
        """The mask element by element, `(N, K)` bool, on the device of `keep`."""
        wide = self.keep.repeat_interleave(self.block.rows, 0).repeat_interleave(self.block.cols, 1)
        return wide[: self.shape[0], : self.shape[1]]

    def csr(self) -> tuple[Tensor, Tensor]:
        """Block-row pointers and block columns of the kept blocks, row by row.

        Returns:
            `crow_indices` `(R + 1,)` int32 and `col_indices` `(Z,)` int32, on the device of `keep`.
        """
        counts = self.keep.sum(1)
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return crow, self.keep.nonzero()[:, 1].to(torch.int32)
