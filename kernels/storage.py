"""Storage of a block-sparse weight: packed values, their indices, and the topology derived from them.

A weight `(N, K)` in blocks `(bo, bi)` is stored as

* `values` `(Z, bi, bo)`: the kept blocks, block row by block row, each transposed, so that the blocks of one block
  row form one contiguous K-major panel `(nnz * bi, bo)`;
* `crow_indices` `(R + 1,)` int32: where each block row begins in `values`;
* `col_indices` `(Z,)` int32: the block column of each block, ascending within a row.

Everything else (`Topology`) follows from the two index vectors and is never saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.blocks import BlockMask, BlockShape, from_blocks, to_blocks
from sparsify.errors import CheckpointError


class Topology(NamedTuple):
    """Index vectors of one block-sparse weight, all int32 on one device.

    Attributes:
        crow: `(R + 1,)` first stored block of each block row.
        col: `(Z,)` block column of each stored block.
        row: `(Z,)` block row of each stored block.
        t_crow: `(C + 1,)` the same as `crow` for the transposed weight: block columns as rows.
        t_row: `(Z,)` block row of each stored block in column order.
        t_block: `(Z,)` position in `values` of each stored block in column order.
    """

    crow: Tensor
    col: Tensor
    row: Tensor
    t_crow: Tensor
    t_row: Tensor
    t_block: Tensor


def pack(weight: Tensor, mask: BlockMask) -> Tensor:
    """Copies the kept blocks of a dense weight into packed values.

    Args:
        weight: `(N, K)`, any dtype and device.
        mask: Which blocks are kept.

    Returns:
        `(Z, bi, bo)`, contiguous, of the weight's dtype and device; padding is zero.
    """
    return to_blocks(weight, mask.block)[mask.keep.to(weight.device)].transpose(1, 2).contiguous()


def unpack(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `pack`: the dense `(N, K)` weight, zero where no block is stored."""
    block = BlockShape(values.shape[2], values.shape[1])
    mask = BlockMask.from_csr(crow, col, shape, block)
    blocks = values.new_zeros(*mask.keep.shape, block.rows, block.cols)
    blocks[mask.keep] = values.transpose(1, 2)
    return from_blocks(blocks, shape).contiguous()


def topology(crow: Tensor, col: Tensor, block_cols: int) -> Topology:
    """Derives the row of every block and the transposed order.

    Args:
        crow: `(R + 1,)` int32.
        col: `(Z,)` int32.
        block_cols: Number of block columns, `C`.
    """
    blocks = col.numel()
    row_ids = torch.arange(crow.numel() - 1, device=crow.device, dtype=torch.int32)
    row = torch.repeat_interleave(row_ids, crow.diff().long(), output_size=blocks)
    t_block = torch.argsort(col, stable=True)
    counts = torch.zeros(block_cols, dtype=torch.int64, device=col.device)
    counts.index_add_(0, col.long(), torch.ones_like(col, dtype=torch.int64))
    t_crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return Topology(crow, col, row, t_crow, row[t_block], t_block.to(torch.int32))


def validate_indices(
    crow: Tensor, col: Tensor, grid: tuple[int, int], blocks: int, name: str = "weight"
) -> None:
    """Refuses indices that would make a kernel read out of bounds.

    Args:
        crow: `(R + 1,)` int32.
        col: `(Z,)` int32.
        grid: `(R, C)` block rows and block columns of the weight.
        blocks: Number of stored blocks, `Z`.
        name: Layer name for the message.

    Raises:
        CheckpointError: If counts, order or range are wrong.
    """
    rows, cols = grid
    fault = None
    if tuple(crow.shape) != (rows + 1,) or tuple(col.shape) != (blocks,):
        fault = f"expected {rows + 1} row pointers and {blocks} columns, got {crow.numel()} and {col.numel()}"
    elif crow.dtype != torch.int32 or col.dtype != torch.int32:
        fault = f"indices must be int32, got {crow.dtype} and {col.dtype}"
    else:
        crow, col = crow.cpu(), col.cpu()
        steps = crow.diff()
        if int(crow[0]) != 0 or int(crow[-1]) != blocks or bool((steps < 0).any()):
            fault = f"row pointers must rise from 0 to {blocks}"
        elif blocks and (int(col.min()) < 0 or int(col.max()) >= cols):
            fault = f"block columns must lie in 0..{cols - 1}, found {int(col.min())}..{int(col.max())}"
        else:
            row = torch.repeat_interleave(torch.arange(rows), steps.long())
            if bool(((col[1:] <= col[:-1]) & (row[1:] == row[:-1])).any()):
                fault = "block columns must ascend within each block row without repeats"
    if fault is not None:
        raise CheckpointError(
            f"corrupted block indices of {name}: {fault}; the checkpoint is damaged, fetch it again"
        )
