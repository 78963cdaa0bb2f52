"""Rows of a block-sparse table: `rows[t] = W[ids[t]]`, zero where no block is stored.

`W` is `(N, K)` in packed storage (see `storage`): values `(Z, bi, bo)`. Row `n` lies in block row `n // bo`, as column
`n % bo` of each of its stored blocks, which `slots` finds without a search: a lookup reads those alone. Torch's own
indexing, on every device; its gradient is an accumulation into the packed values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.storage import Topology


def block_slots(topology: Topology, grid: tuple[int, int]) -> Tensor:
    """Where each block of a matrix is stored, `(R, C)` int32: its number, or -1.

    Args:
        topology: The matrix's index vectors.
        grid: Block rows and block columns `(R, C)`.
    """
    slots = torch.full(grid, -1, dtype=torch.int32, device=topology.col.device)
    numbers = torch.arange(len(topology.col), dtype=torch.int32, device=topology.col.device)
    slots[topology.row.long(), topology.col.long()] = numbers
    return slots


def block_sparse_rows(ids: Tensor, values: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """Looks rows of a block-sparse matrix up.

    Args:
        ids: Row numbers, integers of any shape.
        values: Packed values `(Z, bi, bo)`.
        slots: From `block_slots`, `(R, C)` int32.
        shape: `(N, K)`.

    Returns:
        `(*ids.shape, K)`, the dtype of `values`.

    Raises:
        IndexError: If a number is none of a row; on a GPU a device-side assertion, as in torch's own lookup.
    """
    rows, width = shape
    # Padding behind the last row would answer with zeros, and a negative number from the other end.
    known = (ids >= 0) & (ids < rows)
    found = slots[torch.where(known, ids // values.shape[2], len(slots))]  # (*, C)
    if not len(values):
        return values.new_zeros(*ids.shape, width)
    blocks = values[found.clamp(min=0), :, (ids % values.shape[2]).unsqueeze(-1)]  # (*, C, bi)
    blocks = torch.where((found >= 0).unsqueeze(-1), blocks, 0)
    return blocks.flatten(-2)[..., :width]
