"""Convolutions with a block-sparse weight in plain torch: the CPU path, and what float64 runs on.

Two ways, chosen by block and density. *By position*, one kernel position after the other: the input pixels that meet
it are a strided view of the input, and with the blocks of that position it is the linear layer's product (see
`linear.reference`). So there is one copy of (at most) the input at a time, never one of every position's at once.
Sums over positions are float32 at least. *Dense*: where small blocks cost a CPU more than the zeros between them, the
weight is laid out with its zeros for the length of the call, and torch's own convolution runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.convolution.geometry import Geometry
from sparsify.kernels.linear import reference
from sparsify.kernels.schedule import cached
from sparsify.kernels.storage import Topology, topology

# How many times as long a multiplication takes a CPU in blocks of side `s` as in a dense convolution: the larger of
# `SLOWER` and `SLOWER_SIDE / s`. Measured with one thread at 8x8 to 64x64, 64 and 256 channels, forward and backward.
SLOWER, SLOWER_SIDE = 2.0, 150.0
# Multiplications of a dense convolution that take as long as to copy one number.
COPY = 32


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


def _small_blocks(values: Tensor, topo: Topology, geometry: Geometry) -> bool:
    """Whether a CPU multiplies the dense weight, zeros and all, faster than its blocks."""
    if values.device.type != "cpu":
        return False
    blocks, block_in, block_out = values.shape
    places = (topo.crow.numel() - 1) * geometry.positions * geometry.grid(block_in, block_out)[1]
    share = blocks / max(1, places) * max(SLOWER, SLOWER_SIDE / min(block_in, block_out))
    # Every position copies its pixels' inputs and adds up their outputs.
    return share + COPY * (1 / geometry.group_in + 1 / geometry.group_out) >= 1


def _laid_out(values: Tensor, topo: Topology, geometry: Geometry) -> Tensor:
    """The dense weight `(O, I / groups, height, width)`."""
    _, block_in, block_out = values.shape
    rows, cols = geometry.grid(block_in, block_out)
    blocks = values.new_zeros(geometry.groups * rows, geometry.positions * cols, block_in, block_out)
    blocks[topo.row.long(), topo.col.long()] = values
    parts = blocks.unflatten(1, (geometry.positions, cols)).unflatten(0, (geometry.groups, rows))
    parts = parts.permute(0, 1, 5, 3, 4, 2).flatten(3, 4).flatten(1, 2)  # [groups, R bo, C bi, P]
    weight = parts[:, : geometry.group_out, : geometry.group_in].flatten(0, 1)
    return weight.unflatten(2, (geometry.kernel_h, geometry.kernel_w)).contiguous()


def _stored(weight: Tensor, topo: Topology, geometry: Geometry, block_in: int, block_out: int) -> Tensor:
    """Inverse of `_laid_out`: the stored blocks of a dense weight, `(Z, bi, bo)`; padding is zero."""
    rows, cols = geometry.grid(block_in, block_out)
    parts = weight.flatten(2).unflatten(0, (geometry.groups, -1))
    margins = cols * block_in - geometry.group_in, rows * block_out - geometry.group_out
    parts = torch.nn.functional.pad(parts, (0, 0, 0, margins[0], 0, margins[1]))
    parts = parts.unflatten(2, (cols, block_in)).unflatten(1, (rows, block_out))  # [groups, R, bo, C, bi, P]
    blocks = parts.permute(0, 1, 5, 3, 4, 2).flatten(2, 3).flatten(0, 1)
    return blocks[topo.row.long(), topo.col.long()].contiguous()


def _settings(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation as torch takes them, of inputs that are padded already where sides differ."""
    even = (geometry.top, geometry.left) == (geometry.bottom, geometry.right)
    padding = [geometry.top, geometry.left] if even else [0, 0]
    return [geometry.stride_h, geometry.stride_w], padding, [geometry.dilation_h, geometry.dilation_w]


def _margins(geometry: Geometry) -> tuple[int, int, int, int]:
    """What is to be added to inputs of uneven padding: left, right, top, bottom."""
    if (geometry.top, geometry.left) == (geometry.bottom, geometry.right):
        return 0, 0, 0, 0
    return geometry.left, geometry.right, geometry.top, geometry.bottom


def _gradient(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of a dense convolution's input `(B, I, H, W)`, padded where sides differ, and weight."""
    strides, padding, dilations = _settings(geometry)
    grads = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2), x, weight, None, strides, padding, dilations, False, [0, 0], geometry.groups,
        [*wanted, False],
    )  # fmt: skip
    return grads[0], grads[1]


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
    if _small_blocks(values, topo, geometry) and x.numel():
        weight, (strides, padding, dilations) = _laid_out(values, topo, geometry), _settings(geometry)
        images = torch.nn.functional.pad(x.permute(0, 3, 1, 2), _margins(geometry))
        images = images.contiguous(memory_format=torch.channels_last)
        found = torch.nn.functional.conv2d(images, weight, bias, strides, padding, dilations, geometry.groups)
        return found.permute(0, 2, 3, 1).contiguous()
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
    if _small_blocks(values, topo, geometry) and dy.numel():
        left, right, top, bottom = _margins(geometry)
        sides = height + top + bottom, width + left + right
        like = dy.new_empty(1).expand(len(dy), geometry.in_channels, *sides)  # its values do not matter
        images, _ = _gradient(dy, like, _laid_out(values, topo, geometry), geometry, (True, False))
        return images[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).contiguous()
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
    if (
        _small_blocks(x.new_empty(1).expand(topo.col.numel(), block_in, block_out), topo, geometry)
        and dy.numel()
    ):
        images = torch.nn.functional.pad(x.permute(0, 3, 1, 2), _margins(geometry))
        shape = (geometry.out_channels, geometry.group_in, geometry.kernel_h, geometry.kernel_w)
        _, weight = _gradient(dy, images, x.new_empty(1).expand(shape), geometry, (False, True))
        return _stored(weight, topo, geometry, block_in, block_out)
    dw = x.new_zeros(topo.col.numel(), block_in, block_out)
    for part in _parts(topo, geometry, (block_in, block_out), (x.shape[1], x.shape[2])):
        dy_seen = dy[part.outputs].reshape(-1, geometry.group_out)
        x_seen = x[part.inputs].reshape(-1, geometry.group_in)
        dw[part.blocks] = reference.sdd(dy_seen, x_seen, part.topo, block_in, block_out)
    return dw
