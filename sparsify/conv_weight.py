"""How the weight of a convolution is seen as matrices, and cut into blocks over output and input channels.

A weight `(O, I / groups, *kernel)` has `P` kernel positions. Each group is a matrix of its own:

* *shared*: `(O / groups, I / groups * P)`, the weight as it lies in memory. A block covers `bo` output channels and
  `bi` input channels at all `P` positions, which are kept or removed together;
* *per position*: `P` matrices `(O / groups, I / groups)`, each with a mask of its own.

Both are stored alike (docs/decisions/0011-convolutions.md): one matrix of `groups * R` block rows and `P * C` block
columns, where column `p * C + c` is channel block `c` at position `p`, in row-major order of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import BlockShapeError


def as_linear(mask: BlockMask) -> BlockMask:
    """The mask of a linear layer that multiplies as much: one column block for each kernel position of a block."""
    channels = -(-mask.shape[1] // mask.block.cols) * mask.block.channels
    keep = mask.keep.repeat_interleave(mask.block.positions, 1)
    shape = (mask.shape[0], channels * mask.block.positions)
    return BlockMask(keep, shape, BlockShape(mask.block.rows, mask.block.channels))


@dataclass(frozen=True)
class ConvWeight:
    """Sizes of a convolution's weight, and whether its kernel positions share a mask.

    Attributes:
        out_channels: `O`.
        in_channels: `I`.
        kernel: Size of the kernel in each dimension.
        groups: Groups; both channel counts are multiples of it.
        per_position: Whether each kernel position has a mask of its own.
    """

    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    groups: int = 1
    per_position: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the weight, `(O, I / groups, *kernel)`."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def positions(self) -> int:
        """Kernel positions, `P`."""
        return math.prod(self.kernel)

    @property
    def count(self) -> int:
        """Number of matrices: one a group, or one a group and kernel position."""
        return self.groups * (self.positions if self.per_position else 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(N, K)` of one matrix."""
        columns = self.in_channels // self.groups
        return self.out_channels // self.groups, columns if self.per_position else columns * self.positions

    def block(self, block: BlockShape) -> BlockShape:
        """The block of one matrix for blocks of `bo` output and `bi` input channels."""
        return block.over(1 if self.per_position else self.positions)

    def names(self, module_name: str) -> list[str]:
        """Name of each matrix: the module's, followed by group and position where there are several."""
        names = []
        for index in range(self.count):
            group, position = divmod(index, self.positions) if self.per_position else (index, 0)
            name = module_name if self.groups == 1 else f"{module_name}.group.{group}"
            names.append(f"{name}.position.{position}" if self.per_position else name)
        return names

    def matrix(self, tensor: Tensor, index: int) -> Tensor:
        """Matrix `index` `(N, K)` of a contiguous tensor of the weight's shape; a view."""
        rows, columns = self.out_channels // self.groups, self.in_channels // self.groups
        parts = tensor.view(self.groups, rows, columns, self.positions)
        if not self.per_position:
            return parts[index].view(rows, -1)
        group, position = divmod(index, self.positions)
        return parts[group, :, :, position]

    def join(self, matrices: Tensor) -> Tensor:
        """A tensor of the weight's shape from all its matrices `(count, N, K)`."""
        if self.per_position:
            parts = matrices.unflatten(0, (self.groups, self.positions))
            matrices = parts.permute(0, 2, 3, 1)  # [groups, N, I / groups, P]
        return matrices.reshape(self.full_shape)

    def grid(self, block: BlockShape) -> tuple[int, int]:
        """Block rows and columns of the stored matrix, `(groups * R, P * C)`."""
        rows, cols = self.channel_grid(block)
        return self.groups * rows, self.positions * cols

    def channel_grid(self, block: BlockShape) -> tuple[int, int]:
        """Blocks `(R, C)` that cover the output and the input channels of one group."""
        channels = self.out_channels // self.groups, self.in_channels // self.groups
        return BlockShape(block.rows, block.channels).grid(channels)

    def stored(self, masks: Sequence[BlockMask]) -> Tensor:
        """Which blocks of the stored matrix are kept, `(groups * R, P * C)` bool.

        Args:
            masks: One a matrix.

        Raises:
            BlockShapeError: If a mask does not fit, or their number is another.
        """
        block = masks[0].block if masks else BlockShape(8, 8)
        if len(masks) != self.count or any(
            (mask.shape, mask.block) != (self.shape, self.block(block)) for mask in masks
        ):
            got = f"{len(masks)} for {masks[0].shape} in blocks of {block}" if masks else "none"
            raise BlockShapeError(
                f"masks of a convolution: got {got}, expected {self.count} for {self.shape} "
                f"({'one' if self.per_position else 'all'} of {self.positions} kernel positions)"
            )
        keep = torch.stack([mask.keep for mask in masks])
        if self.per_position:
            keep = keep.unflatten(0, (self.groups, self.positions)).transpose(1, 2)
        else:
            keep = keep[:, :, None].expand(-1, -1, self.positions, -1)
        return keep.reshape(self.grid(block))

    def masks(self, keep: Tensor, block: BlockShape) -> list[BlockMask]:
        """The masks of all matrices from that of the stored one; inverse of `stored`.

        A block over shared positions counts as kept if any of its positions is stored.
        """
        rows, cols = self.channel_grid(block)
        parts = keep.reshape(self.groups, rows, self.positions, cols)
        parts = parts.transpose(1, 2).flatten(0, 1) if self.per_position else parts.any(2)
        return [BlockMask(part, self.shape, self.block(block)) for part in parts]

    def pack(self, weight: Tensor, keep: Tensor, block: BlockShape) -> Tensor:
        """The kept blocks `(Z, bi, bo)` of a weight, row by row of the stored matrix; padding is zero.

        Args:
            weight: `(O, I / groups, *kernel)`.
            keep: `(groups * R, P * C)` bool.
            block: Block shape `(bo, bi)`.
        """
        rows, cols = self.channel_grid(block)
        parts = weight.reshape(self.groups, -1, self.in_channels // self.groups, self.positions)
        pad = cols * block.channels - parts.shape[2], rows * block.rows - parts.shape[1]
        parts = torch.nn.functional.pad(parts, (0, 0, 0, pad[0], 0, pad[1]))
        parts = parts.unflatten(2, (cols, -1)).unflatten(1, (rows, -1))  # [groups, R, bo, C, bi, P]
        blocks = parts.permute(0, 1, 5, 3, 4, 2).flatten(2, 3).flatten(0, 1)  # [groups R, P C, bi, bo]
        return blocks[keep.to(weight.device)].contiguous()

    def unpack(self, values: Tensor, keep: Tensor) -> Tensor:
        """Inverse of `pack`: the weight `(O, I / groups, *kernel)`, zero where no block is stored."""
        block = BlockShape(values.shape[2], values.shape[1])
        rows, cols = self.channel_grid(block)
        blocks = values.new_zeros(*keep.shape, *values.shape[1:])
        blocks[keep.to(values.device)] = values
        parts = blocks.unflatten(1, (self.positions, cols)).unflatten(0, (self.groups, rows))
        parts = parts.permute(0, 1, 5, 3, 4, 2).flatten(3, 4).flatten(1, 2)  # [groups, R bo, C bi, P]
        parts = parts[:, : self.out_channels // self.groups, : self.in_channels // self.groups]
        return parts.reshape(self.full_shape)
