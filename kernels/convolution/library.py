"""The block-sparse convolutions as torch operators: `sparsify::conv`, `conv_dx`, `conv_dw`.

The three are closed under differentiation, as those of the linear layer are; see `linear.library`. On a GPU the Triton
kernels run them, elsewhere and in float64 the torch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.convolution import reference as conv_reference
from sparsify.kernels.convolution.geometry import Geometry
from sparsify.kernels.linear.library import autocasting, plain
from sparsify.kernels.storage import Topology

_lib = torch.library.Library("sparsify", "FRAGMENT")
_lib.define("conv(Tensor x, Tensor values, Tensor? bias, Tensor[] topology, int[] geometry) -> Tensor")
_lib.define(
    "conv_dx(Tensor dy, Tensor values, Tensor[] topology, int[] geometry, SymInt height, SymInt width) -> Tensor"
)
_lib.define(
    "conv_dw(Tensor dy, Tensor x, Tensor[] topology, int[] geometry, int block_in, int block_out) -> Tensor"
)


class Conv(torch.autograd.Function):
    """`conv` with its gradients, for eager mode; the backward pass calls the operators, so it is differentiable too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, geometry: Geometry, *topo: Tensor
    ) -> Tensor:
        _save_for_conv(ctx, (x, values, bias, topo, geometry), x)
        return conv(x, values, bias, topo, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dx, dvalues, dbias, topo, _ = _backward_conv(ctx, grads[0])
        return dx, dvalues, dbias, None, *topo


def _kernels(operand: Tensor) -> Any:
    portable = operand.is_cuda and operand.dtype != torch.float64
    return import_module("sparsify.kernels.convolution.triton_conv") if portable else conv_reference


def _check(images: Tensor, other: Tensor, channels: int) -> None:
    if images.dim() != 4 or images.dtype != other.dtype or images.shape[3] != channels:
        raise ValueError(
            f"block-sparse convolution of {tuple(images.shape)} {images.dtype} with {other.dtype}: expected "
            f"(batch, height, width, {channels}) and operands of one dtype"
        )


def conv(
    x: Tensor, values: Tensor, bias: Tensor | None, topology: Sequence[Tensor], geometry: Sequence[int]
) -> Tensor:
    """The convolution; see `reference.conv`.

    Raises:
        ValueError: If the operands do not fit each other.
    """
    geometry = Geometry(*geometry)
    _check(x, values, geometry.in_channels)
    if min(geometry.out_size(x.shape[1], x.shape[2])) < 1:
        raise ValueError(
            f"block-sparse convolution: an input of {x.shape[1]}x{x.shape[2]} with its padding is smaller than the "
            f"kernel"
        )
    return _kernels(x).conv(x, values, bias, Topology(*topology), geometry)


def _conv_dx(
    dy: Tensor, values: Tensor, topology: Sequence[Tensor], geometry: Sequence[int], height: int, width: int
) -> Tensor:
    geometry = Geometry(*geometry)
    _check(dy, values, geometry.out_channels)
    return _kernels(dy).conv_dx(dy, values, Topology(*topology), geometry, height, width)


def _conv_dw(
    dy: Tensor, x: Tensor, topology: Sequence[Tensor], geometry: Sequence[int], block_in: int, block_out: int
) -> Tensor:
    geometry = Geometry(*geometry)
    _check(x, dy, geometry.in_channels)
    return _kernels(x).conv_dw(dy, x, Topology(*topology), geometry, block_in, block_out)


def _fake_conv(
    x: Tensor, values: Tensor, bias: Tensor | None, topology: Sequence[Tensor], geometry: Sequence[int]
) -> Tensor:
    sizes = Geometry(*geometry)
    return x.new_empty(x.shape[0], *sizes.out_size(x.shape[1], x.shape[2]), sizes.out_channels)


def _fake_conv_dx(
    dy: Tensor, values: Tensor, topology: Sequence[Tensor], geometry: Sequence[int], height: int, width: int
) -> Tensor:
    return dy.new_empty(dy.shape[0], height, width, Geometry(*geometry).in_channels)


def _fake_conv_dw(
    dy: Tensor, x: Tensor, topology: Sequence[Tensor], geometry: Sequence[int], block_in: int, block_out: int
) -> Tensor:
    return x.new_empty(topology[1].shape[0], block_in, block_out)


def _save_for_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, topology, geometry = inputs
    # Each operand is needed only for the other's gradient: a frozen weight keeps no activations alive.
    ctx.save_for_backward(x if values.requires_grad else None, values if x.requires_grad else None, *topology)
    ctx.size, ctx.block = (x.shape[1], x.shape[2]), values.shape[1:]
    ctx.geometry, ctx.has_bias = geometry, bias is not None


def _backward_conv(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, *topology = ctx.saved_tensors
    dy = dy.contiguous()  # the gradient of a sum is expanded
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    # Called directly unless somebody traces the backward pass or wants to differentiate it.
    direct = not torch.is_grad_enabled() and all(plain(dy, t) for t in (x, values) if t is not None)
    ops = torch.ops.sparsify
    run_dx, run_dw = (_conv_dx, _conv_dw) if direct else (ops.conv_dx, ops.conv_dw)
    dx = run_dx(dy, values, topology, ctx.geometry, *ctx.size) if need_x else None
    dvalues = run_dw(dy, x, topology, ctx.geometry, *ctx.block) if need_values else None
    dbias = dy.sum((0, 1, 2)) if ctx.has_bias and need_bias else None
    return dx, dvalues, dbias, [None] * len(topology), None


def _save_for_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, values, topology, geometry, _, _ = inputs
    ctx.save_for_backward(dy, values, *topology)
    ctx.geometry = geometry


def _backward_dx(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, values, *topology = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ops, grad = torch.ops.sparsify, grad.contiguous()
    ddy = ops.conv(grad, values, None, topology, ctx.geometry) if need_dy else None
    dvalues = ops.conv_dw(dy, grad, topology, ctx.geometry, *values.shape[1:]) if need_values else None
    return ddy, dvalues, [None] * len(topology), None, None, None


def _save_for_dw(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, topology, geometry, _, _ = inputs
    ctx.save_for_backward(dy, x, *topology)
    ctx.geometry = geometry


def _backward_dw(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, x, *topology = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    ops, grad = torch.ops.sparsify, grad.contiguous()
    ddy = ops.conv(x, grad, None, topology, ctx.geometry) if need_dy else None
    dx = ops.conv_dx(dy, grad, topology, ctx.geometry, x.shape[1], x.shape[2]) if need_x else None
    return ddy, dx, [None] * len(topology), None, None, None


for _name, _forward, _fake, _save, _backward in (
    ("conv", conv, _fake_conv, _save_for_conv, _backward_conv),
    ("conv_dx", _conv_dx, _fake_conv_dx, _save_for_dx, _backward_dx),
    ("conv_dw", _conv_dw, _fake_conv_dw, _save_for_dw, _backward_dw),
):
    _lib.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{_name}", _fake, lib=_lib)
    torch.library.register_autograd(f"sparsify::{_name}", _backward, setup_context=_save, lib=_lib)
    for _key, _device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        _lib.impl(_name, autocasting(_name, _device), _key)
