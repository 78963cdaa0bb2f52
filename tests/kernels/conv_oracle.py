"""Cases and oracle of the block-sparse convolutions, shared by the CPU and the GPU tests; tolerances as in `oracle`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.blocks import BlockMask, BlockShape
from sparsify.conv_weight import ConvWeight
from sparsify.kernels.convolution.geometry import Geometry, conv_topology
from sparsify.kernels.storage import Topology
from tests.kernels.oracle import assert_close


@dataclass(frozen=True)
class Case:
    """Sizes of one convolution, and how its mask is made."""

    size: tuple[int, int]
    channels: tuple[int, int]
    block: tuple[int, int] = (16, 16)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    per_position: bool = False
    density: float = 0.5
    empty_row: bool = False
    bias: bool = True
    batch: int = 2

    def __str__(self) -> str:
        sides = [self.size, self.channels, self.block, self.kernel, self.stride, self.dilation]
        name = "-".join("x".join(map(str, side)) for side in sides)
        extra = "-each" if self.per_position else ""
        return f"{name}-p{''.join(map(str, self.padding))}-g{self.groups}-{self.density:g}{extra}"


CASES = [
    Case((7, 9), (32, 48), empty_row=True),
    Case((8, 8), (20, 36), (16, 32), per_position=True),  # both channel counts padded
    Case((9, 7), (24, 16), (8, 8), stride=(2, 2)),
    Case((11, 8), (24, 40), stride=(3, 2), dilation=(2, 3), padding=(2, 2, 3, 3), per_position=True),
    Case((6, 6), (48, 32), groups=2, bias=False),
    Case(
        (6, 5), (36, 60), (16, 8), groups=3, stride=(2, 1), per_position=True
    ),  # groups that blocks do not divide
    Case((5, 5), (32, 32), kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0)),  # phases without any position
    Case((6, 7), (32, 16), kernel=(4, 2), padding=(1, 2, 0, 1)),  # even kernel, as padding="same"
    Case((9, 9), (16, 32), kernel=(7, 7), padding=(3, 3, 3, 3), stride=(2, 2)),  # more positions than bits
    Case((1, 33), (24, 32), (32, 8), kernel=(1, 5), padding=(0, 0, 2, 2), stride=(1, 2)),  # one dimension
    Case((5, 5), (70, 130), (64, 64), density=1.0),
    Case((4, 4), (32, 32), (32, 32), density=0.0),
    Case((2, 2), (16, 16), stride=(3, 3), padding=(2, 2, 2, 2)),  # an image smaller than its stride
    Case((3, 3), (10, 9), (32, 16), density=1.0, batch=1),  # smaller than the only block
]


@dataclass
class Operands:
    """Inputs of one case in `dtype`, and the masked dense weight that goes with them."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    keep: Tensor
    values: Tensor
    topo: Topology
    geometry: Geometry
    layout: ConvWeight
    block: BlockShape


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> Operands:
    """Random operands of a case, activations as `(B, H, W, C)`; every number is exact in `dtype`."""
    (inputs, outputs), block = case.channels, BlockShape(*case.block)
    layout = ConvWeight(outputs, inputs, case.kernel, case.groups, case.per_position)
    masks = []
    for _ in range(layout.count):
        own = layout.block(block)
        keep = torch.rand(own.grid(layout.shape)) < case.density
        keep[0] &= not case.empty_row
        masks.append(BlockMask(keep, layout.shape, own))
    keep = layout.stored(masks)
    crow, col = (index.to(device) for index in BlockMask(keep, *_padded(layout, block)).csr())
    geometry = Geometry(
        case.groups, inputs, outputs, *case.kernel, *case.stride, *case.padding, *case.dilation
    )
    elements = layout.join(torch.stack([mask.elements() for mask in masks]))
    scale = (inputs * layout.positions / case.groups) ** 0.5
    weight = (torch.randn(layout.full_shape) / scale * elements).to(device, dtype)
    x = torch.randn(case.batch, *case.size, inputs).to(device, dtype)
    dy = torch.randn(case.batch, *geometry.out_size(*case.size), outputs).to(device, dtype)
    bias = torch.randn(outputs).to(device, dtype) if case.bias else None
    topo = conv_topology(crow, col, geometry, layout.channel_grid(block)[1])
    return Operands(
        x, dy, weight, bias, keep, layout.pack(weight, keep, block), topo, geometry, layout, block
    )


def _padded(layout: ConvWeight, block: BlockShape) -> tuple[tuple[int, int], BlockShape]:
    rows, cols = layout.grid(block)
    return (rows * block.rows, cols * block.cols), block


def dense_conv(o: Operands, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's convolution of `(B, H, W, I)`; the result is `(B, OH, OW, O)`."""
    g = o.geometry
    padded = functional.pad(x.permute(0, 3, 1, 2), (g.left, g.right, g.top, g.bottom))
    strides, dilations = (g.stride_h, g.stride_w), (g.dilation_h, g.dilation_w)
    return functional.conv2d(padded, weight, bias, strides, 0, dilations, g.groups).permute(0, 2, 3, 1)


def dense_products(o: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the gradients of input and weight, of torch's convolution in `dtype`."""
    x, weight = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (o.x, o.weight))
    y = dense_conv(o, x, weight, None if o.bias is None else o.bias.to(dtype))
    y.backward(o.dy.to(dtype))
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def check_products(case: Case, dtype: torch.dtype, kernels: Any, device: str = "cpu", **options: Any) -> None:
    """Checks `conv`, `conv_dx` and `conv_dw` of a module against dense float64."""
    o = make(case, dtype, device)
    exact, dense = dense_products(o, torch.float64), dense_products(o, dtype)
    y = kernels.conv(o.x, o.values, o.bias, o.topo, o.geometry, **options)
    assert y.is_contiguous()
    assert_close(y, exact[0], dense[0])
    dx = kernels.conv_dx(o.dy, o.values, o.topo, o.geometry, *case.size, **options)
    assert dx.is_contiguous()
    assert_close(dx, exact[1], dense[1])
    dw = kernels.conv_dw(o.dy, o.x, o.topo, o.geometry, o.block.cols, o.block.rows, **options)
    assert dw.shape == o.values.shape and dw.dtype == dtype
    padding = o.layout.pack(torch.ones_like(o.weight), o.keep, o.block) == 0
    assert not dw[padding].any()  # the padding is never trained
    if dw.numel():
        assert_close(dw, *(o.layout.pack(weight, o.keep, o.block) for weight in (exact[2], dense[2])))
