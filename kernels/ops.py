"""The block-sparse products as torch operators, `sparsify::dsd`, `sparsify::dds` and `sparsify::sdd`.

Each works under autograd (twice differentiable, since the three are closed under differentiation), `torch.compile`
with `fullgraph=True`, autocast and CUDA graphs. `dispatch` says which kernel runs; Triton is imported by the first CUDA
call, not by this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.dispatch import choose
from sparsify.kernels.storage import Topology

_lib = torch.library.Library("sparsify", "DEF")
_lib.define("dsd(Tensor x, Tensor values, Tensor? bias, Tensor[] topology, int out_features) -> Tensor")
_lib.define("dds(Tensor dy, Tensor values, Tensor[] topology, int in_features) -> Tensor")
_lib.define("sdd(Tensor dy, Tensor x, Tensor[] topology, int block_in, int block_out) -> Tensor")


def block_sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, out_features: int
) -> Tensor:
    """`y = x W^T + bias` with a block-sparse weight.

    Args:
        x: `(..., K)` activations, floating point.
        values: `(Z, bi, bo)` packed blocks, the dtype and device of `x` (autocast casts both).
        bias: `(N,)` or `None`.
        topo: Indices of the weight, on the device of `x`.
        out_features: `N`.

    Returns:
        `(..., N)`.

    Raises:
        ValueError: If dtypes or the last dimension of `x` do not fit.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not _plain(flat, values):
        y = torch.ops.sparsify.dsd(flat, values, bias, list(topo), out_features)
        return y.view(*x.shape[:-1], out_features)
    device = flat.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        flat, values, bias = (
            _cast(flat, dtype),
            _cast(values, dtype),
            bias if bias is None else _cast(bias, dtype),
        )
    wanted = flat.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        y = _Linear.apply(flat, values, bias, out_features, *topo)
    else:
        y = _dsd(flat, values, bias, topo, out_features)
    return y.view(*x.shape[:-1], out_features)


def _plain(x: Tensor, values: Tensor) -> bool:
    """Whether nothing watches the call: then it goes to the kernel directly.

    The dispatcher's Python layers cost 30 microseconds a call, and 250 where a gradient is wanted; they are needed
    for tracing (compile, export), functional transforms, dispatch modes and tensor subclasses alone.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and type(values) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


class _Linear(torch.autograd.Function):
    """`dsd` with its gradients, for eager mode; the backward pass calls the operators, so it is differentiable too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, out_features: int, *topo: Tensor
    ) -> Tensor:
        _save_for_dsd(ctx, (x, values, bias, topo, out_features), x)
        return _dsd(x, values, bias, topo, out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dx, dvalues, dbias, topo, _ = _backward_dsd(ctx, grads[0])
        return dx, dvalues, dbias, None, *topo


def _check(left: Tensor, right: Tensor, width: int, blocks: int, side: int) -> None:
    """The one place where operands are checked; kernels and reference trust them."""
    if left.dim() != 2 or left.dtype != right.dtype:
        raise ValueError(
            f"block-sparse product of {tuple(left.shape)} {left.dtype} with {tuple(right.shape)} {right.dtype}: "
            f"expected a matrix and operands of one dtype"
        )
    if not (blocks - 1) * side < width <= blocks * side:
        raise ValueError(
            f"block-sparse product: got {width} features, expected {(blocks - 1) * side + 1} to {blocks * side} "
            f"({blocks} blocks of {side})"
        )


def _dsd(
    x: Tensor, values: Tensor, bias: Tensor | None, topology: Sequence[Tensor], out_features: int
) -> Tensor:
    topo = Topology(*topology)
    _check(x, values, x.shape[-1], topo.t_crow.numel() - 1, values.shape[1])
    run = choose("dsd", x, values, (values.shape[1], values.shape[2]), out_features)
    return run(x, values, bias, topo, out_features)


def _dds(dy: Tensor, values: Tensor, topology: Sequence[Tensor], in_features: int) -> Tensor:
    topo = Topology(*topology)
    _check(dy, values, dy.shape[-1], topo.crow.numel() - 1, values.shape[2])
    run = choose("dds", dy, values, (values.shape[1], values.shape[2]), in_features)
    return run(dy, values, topo, in_features)


def _sdd(dy: Tensor, x: Tensor, topology: Sequence[Tensor], block_in: int, block_out: int) -> Tensor:
    topo = Topology(*topology)
    _check(dy, x, dy.shape[-1], topo.crow.numel() - 1, block_out)
    return choose("sdd", dy, x, (block_in, block_out), 0)(dy, x, topo, block_in, block_out)


def _fake_dsd(
    x: Tensor, values: Tensor, bias: Tensor | None, topology: Sequence[Tensor], out_features: int
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _fake_dds(dy: Tensor, values: Tensor, topology: Sequence[Tensor], in_features: int) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


def _fake_sdd(dy: Tensor, x: Tensor, topology: Sequence[Tensor], block_in: int, block_out: int) -> Tensor:
    return x.new_empty(topology[1].shape[0], block_in, block_out)


def _save_for_dsd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, topology, _out_features = inputs
    # Each operand is needed only for the other's gradient: a frozen weight keeps no activations alive.
    ctx.save_for_backward(x if values.requires_grad else None, values if x.requires_grad else None, *topology)
    ctx.in_features, ctx.block, ctx.has_bias = x.shape[1], values.shape[1:], bias is not None


def _backward_dsd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, *topology = ctx.saved_tensors
    dy = dy.contiguous()  # the gradient of a sum is expanded
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    # Called directly unless somebody traces the backward pass or wants to differentiate it.
    direct = not torch.is_grad_enabled() and all(_plain(dy, t) for t in (x, values) if t is not None)
    dds, sdd = (_dds, _sdd) if direct else (torch.ops.sparsify.dds, torch.ops.sparsify.sdd)
    dx = dds(dy, values, topology, ctx.in_features) if need_x else None
    dvalues = sdd(dy, x, topology, *ctx.block) if need_values else None
    dbias = dy.sum(0) if ctx.has_bias and need_bias else None
    return dx, dvalues, dbias, [None] * len(topology), None


def _save_for_dds(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, values, topology, _ = inputs
    ctx.save_for_backward(dy, values, *topology)


def _backward_dds(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, values, *topology = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ddy = torch.ops.sparsify.dsd(grad, values, None, topology, dy.shape[1]) if need_dy else None
    dvalues = torch.ops.sparsify.sdd(dy, grad, topology, *values.shape[1:]) if need_values else None
    return ddy, dvalues, [None] * len(topology), None


def _save_for_sdd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, topology, _, _ = inputs
    ctx.save_for_backward(dy, x, *topology)


def _backward_sdd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, x, *topology = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = torch.ops.sparsify.dsd(x, grad, None, topology, dy.shape[1]) if need_dy else None
    dx = torch.ops.sparsify.dds(dy, grad, topology, x.shape[1]) if need_x else None
    return ddy, dx, [None] * len(topology), None, None


def _autocast(name: str, device_type: str) -> Any:
    """Casts the floating operands to autocast's dtype, as `F.linear` does."""

    def cast(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        cast_args = [_cast(a, dtype) if isinstance(a, Tensor) else a for a in args]
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.sparsify, name)(*cast_args)

    return cast


for _name, _forward, _fake, _save, _backward in (
    ("dsd", _dsd, _fake_dsd, _save_for_dsd, _backward_dsd),
    ("dds", _dds, _fake_dds, _save_for_dds, _backward_dds),
    ("sdd", _sdd, _fake_sdd, _save_for_sdd, _backward_sdd),
):
    _lib.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{_name}", _fake, lib=_lib)
    torch.library.register_autograd(f"sparsify::{_name}", _backward, setup_context=_save, lib=_lib)
    for _key, _device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        _lib.impl(_name, _autocast(_name, _device), _key)
