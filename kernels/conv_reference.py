"""Convolutions with a block-sparse weight in plain torch: the CPU path, and what float64 runs on.

One kernel position after the other: the input pixels that meet it are a strided view of the input, and with the blocks
of that position it is the linear layer's product of `reference`. So there is one copy of (at most) the input at a time,
and never one of every position's side by side. Sums over positions are float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels import reference
from sparsify.kernels.conv_geometry import Geometry
from sparsify.kernels.schedule import cached
from sparsify.kernels.storage import Topology, topology


class _Part(NamedTuple):
    """The blocks of one group at one kernel position.

    Attributes:
        inputs: Channels, rows and columns of the input that they read.
        outputs: Channels, rows and columns of the output that they write.
        blocks: Their places in `values`.
        topo: Indices of this part of the weight.
    """

    inputs: tuple[slice, slice, slice, slice]
    outputs: tuple[slice, slice, slice, slice]
    blocks: Tensor
    topo: Topology


def _parts(topo: Topology, geometry: Geometry, block: tuple[int, int], size: tuple[int, int]) -> list[_Part]:
    """The parts of a weight that have blocks and meet pixels of an input of `size`; made once for each size."""
    key = "conv", geometry, block, size
    return cached(topo, key, lambda: list(_make_parts(topo, geometry, block, size)))


def _make_parts(
    topo: Topology, geometry: Geometry, block: tuple[int, int], size: tuple[int, int]
) -> Iterator[_Part]:
    rows, cols = geometry.grid(*block)
    row, col = topo.row.long(), topo.col.long()
    part = row // rows * geometry.positions + col // cols
    order = torch.argsort(part, stable=True)
    counts = torch.bincount(part, minlength=geometry.groups * geometry.positions).tolist()
    begin = 0
    for index, count in enumerate(counts):
        own = order[begin : begin + count]
        begin += count
        group, position = divmod(index, geometry.positions)
        where = _meeting(geometry, position, size)
        if not count or where is None:
            continue
        lengths = torch.bincount(row[own] - group * rows, minlength=rows)
        crow = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        own_topo = topology(crow, (col[own] % cols).to(torch.int32), cols)
        everything = slice(None)
        read = slice(group * geometry.group_in, (group + 1) * geometry.group_in)
        write = slice(group * geometry.group_out, (group + 1) * geometry.group_out)
        (in_y, out_y), (in_x, out_x) = where
        yield _Part((everything, in_y, in_x, read), (everything, out_y, out_x, write), own, own_topo)


def _meeting(
    geometry: Geometry, position: int, size: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Rows and columns of input and output that meet at a kernel position; `None` if none do."""
    out_size = geometry.out_size(*size)
    offsets = divmod(position, geometry.kernel_w)
    found = []
    for axis, (low, stride, dilation) in enumerate(
        (
            (geometry.top, geometry.stride_h, geometry.dilation_h),
            (geometry.left, geometry.stride_w, geometry.dilation_w),
        )
    ):
        shift = offsets[axis] * dilation - low  # input = output * stride + shift
        first = max(0, -(shift // stride))
        end = min(out_size[axis], -((shift - size[axis]) // stride))
        if first >= end:
            return None
        start = first * stride + shift
        found.append((slice(start, start + (end - first - 1) * stride + 1, stride), slice(first, end)))
    return found[0], found[1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def conv(x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, geometry: Sequence[int]) -> Tensor:
    """The convolution.

    Args:
        x: `(B, H, W, I)`, any strides.
        values: `(Z, bi, bo)`, the dtype of `x`.
        bias: `(O,)` or `None`.
        topo: Indices of the weight, from `conv_topology`.
        geometry: A `Geometry`.

    Returns:
        `(B, OH, OW, O)`, contiguous.
    """
    geometry = Geometry(*geometry)
    size = (x.shape[1], x.shape[2])
    y = x.new_zeros(x.shape[0], *geometry.out_size(*size), geometry.out_channels, dtype=_wide(x.dtype))
    for part in _parts(topo, geometry, (values.shape[1], values.shape[2]), size):
        seen = x[part.inputs]
        product = reference.dsd(
            seen.reshape(-1, geometry.group_in), values[part.blocks], None, part.topo, geometry.group_out
        )
        y[part.outputs] += product.view(*seen.shape[:3], geometry.group_out)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def conv_dx(
    dy: Tensor, values: Tensor, topo: Topology, geometry: Sequence[int], height: int, width: int
) -> Tensor:
    """Gradient of the input.

    Args:
        dy: `(B, OH, OW, O)`.
        values: `(Z, bi, bo)`, the dtype of `dy`.
        topo: Indices of the weight.
        geometry: A `Geometry`.
        height: `H`.
        width: `W`.

    Returns:
        `(B, H, W, I)`, contiguous.
    """
    geometry = Geometry(*geometry)
    dx = dy.new_zeros(dy.shape[0], height, width, geometry.in_channels, dtype=_wide(dy.dtype))
    for part in _parts(topo, geometry, (values.shape[1], values.shape[2]), (height, width)):
        seen = dy[part.outputs]
        product = reference.dds(
            seen.reshape(-1, geometry.group_out), values[part.blocks], part.topo, geometry.group_in
        )
        dx[part.inputs] += product.view(*seen.shape[:3], geometry.group_in)
    return dx.to(dy.dtype)


def conv_dw(
    dy: Tensor, x: Tensor, topo: Topology, geometry: Sequence[int], block_in: int, block_out: int
) -> Tensor:
    """Gradient of the weight at its stored blocks.

    Args:
        dy: `(B, OH, OW, O)`.
        x: `(B, H, W, I)`, the dtype of `dy`.
        topo: Indices of the weight.
        geometry: A `Geometry`.
        block_in: `bi`.
        block_out: `bo`.

    Returns:
        `(Z, bi, bo)`, contiguous; exactly zero in the padding.
    """
    geometry = Geometry(*geometry)
    dw = x.new_zeros(topo.col.numel(), block_in, block_out)
    for part in _parts(topo, geometry, (block_in, block_out), (x.shape[1], x.shape[2])):
        dy_seen = dy[part.outputs].reshape(-1, geometry.group_out)
        x_seen = x[part.inputs].reshape(-1, geometry.group_in)
        dw[part.blocks] = reference.sdd(dy_seen, x_seen, part.topo, block_in, block_out)
    return dw
