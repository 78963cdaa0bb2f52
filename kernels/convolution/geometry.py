"""Sizes of a convolution, and the index vectors of its block-sparse weight.

The stored weight is one matrix (docs/decisions/0011-convolutions.md) of `groups * R` block rows and `P * C` block
columns: column `p * C + c` is channel block `c` of the row's own group at kernel position `p`. Its forward product
needs no other indices than `crow` and `col`. For the input gradient the blocks are listed by input channel block and by
*phase*: with a stride `s` an input pixel `y` meets only the kernel positions `k` with `y = k * dilation - padding`
modulo `s`, so pixels of equal `y mod s` share their list and multiply nothing in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.storage import Topology


class Geometry(NamedTuple):
    """What a convolution over `(batch, height, width, channels)` does, weights aside; one dimension has height 1.

    Attributes:
        groups: Groups of channels.
        in_channels: `I`, a multiple of `groups`.
        out_channels: `O`, a multiple of `groups`.
        kernel_h: Height of the kernel.
        kernel_w: Width of the kernel.
        stride_h: Rows between two outputs.
        stride_w: Columns between two outputs.
        top: Rows of zeros before the first.
        bottom: Rows of zeros after the last.
        left: Columns of zeros before the first.
        right: Columns of zeros after the last.
        dilation_h: Rows between two kernel positions.
        dilation_w: Columns between two kernel positions.
    """

    groups: int
    in_channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1

    @property
    def positions(self) -> int:
        """Kernel positions, `P`."""
        return self.kernel_h * self.kernel_w

    @property
    def phases(self) -> int:
        """Classes of input pixels that meet the same kernel positions: `stride_h * stride_w`."""
        return self.stride_h * self.stride_w

    @property
    def group_in(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of a group."""
        return self.out_channels // self.groups

    def grid(self, block_in: int, block_out: int) -> tuple[int, int]:
        """Blocks `(R, C)` over the output and the input channels of one group."""
        return -(-self.group_out // block_out), -(-self.group_in // block_in)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        return (
            (height + self.top + self.bottom - self.dilation_h * (self.kernel_h - 1) - 1) // self.stride_h
            + 1,
            (width + self.left + self.right - self.dilation_w * (self.kernel_w - 1) - 1) // self.stride_w + 1,
        )


def conv_topology(crow: Tensor, col: Tensor, geometry: Sequence[int], channel_blocks: int) -> Topology:
    """Derives the row of every block and the transposed order of a convolution's weight.

    Args:
        crow: `(groups * R + 1,)` int32.
        col: `(Z,)` int32, `p * C + c`.
        geometry: A `Geometry`.
        channel_blocks: `C`, channel blocks of one group.

    Returns:
        `t_crow` `(groups * C * phases + 1,)` counts blocks by channel block and, within it, by phase; `t_row` is
        `p * groups * R + row` of each block in that order, and `t_block` its place in `values`.
    """
    geometry = Geometry(*geometry)
    rows, blocks = crow.numel() - 1, col.numel()
    row = torch.repeat_interleave(
        torch.arange(rows, device=crow.device), crow.diff().long(), output_size=blocks
    )
    position = col.long() // channel_blocks
    y = position // geometry.kernel_w * geometry.dilation_h - geometry.top
    x = position % geometry.kernel_w * geometry.dilation_w - geometry.left
    phase = y.remainder(geometry.stride_h) * geometry.stride_w + x.remainder(geometry.stride_w)
    group = row // (rows // geometry.groups)
    part = (group * channel_blocks + col.long() % channel_blocks) * geometry.phases + phase
    order = torch.argsort(part, stable=True)
    counts = torch.zeros(
        geometry.groups * channel_blocks * geometry.phases, dtype=torch.int64, device=col.device
    )
    counts.index_add_(0, part, torch.ones_like(part))
    t_crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    t_row = (position * rows + row)[order]
    t_crow, t_row, t_block, row = (index.to(torch.int32) for index in (t_crow, t_row, order, row))
    return Topology(crow, col, row, t_crow, t_row, t_block)
