"""Convolution with a block-sparse weight: the function that modules call.

It works under autograd, `torch.compile` with `fullgraph=True`, `torch.export`, autocast and CUDA graphs, as
`linear.ops.block_sparse_linear` does. A kernel of one position is the linear layer's product of pixels, and takes its
kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.convolution import library as conv_library
from sparsify.kernels.convolution.geometry import Geometry, conv_topology
from sparsify.kernels.linear.library import cast, plain
from sparsify.kernels.linear.ops import block_sparse_linear
from sparsify.kernels.storage import Topology, topology


def block_sparse_conv(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, geometry: Geometry
) -> Tensor:
    """A convolution of images with a block-sparse weight.

    Args:
        x: `(B, H, W, I)` activations, floating point; best contiguous (channels-last).
        values: `(Z, bi, bo)` packed blocks, the dtype and device of `x` (autocast casts both).
        bias: `(O,)` or `None`.
        topo: Indices of the weight from `indices`, on the device of `x`.
        geometry: Sizes of the convolution.

    Returns:
        `(B, OH, OW, O)`, contiguous.

    Raises:
        ValueError: If dtypes or channels do not fit, or the input is smaller than the kernel.
    """
    if pointwise(geometry):
        seen = x[:, :: geometry.stride_h, :: geometry.stride_w]
        return block_sparse_linear(seen, values, bias, topo, geometry.out_channels)
    if not plain(x, values):
        return torch.ops.sparsify.conv(x, values, bias, list(topo), list(geometry))
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = cast(x, dtype), cast(values, dtype)
        bias = None if bias is None else cast(bias, dtype)
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and wanted:
        return conv_library.Conv.apply(x, values, bias, geometry, *topo)  # pyright: ignore[reportReturnType]
    return conv_library.conv(x, values, bias, topo, geometry)


def pointwise(geometry: Geometry) -> bool:
    """Whether a convolution is a linear layer of single pixels."""
    margins = geometry.top, geometry.bottom, geometry.left, geometry.right
    return geometry.positions == 1 and geometry.groups == 1 and not any(margins)


def indices(crow: Tensor, col: Tensor, geometry: Geometry, channel_blocks: int) -> Topology:
    """The index vectors that `block_sparse_conv` takes; see `conv_topology`.

    Args:
        crow: `(groups * R + 1,)` int32.
        col: `(Z,)` int32.
        geometry: Sizes of the convolution.
        channel_blocks: `C`, blocks over the input channels of one group.
    """
    if pointwise(geometry):  # pixels that a stride passes over never reach the product
        return topology(crow, col, channel_blocks)
    return conv_topology(crow, col, geometry, channel_blocks)
