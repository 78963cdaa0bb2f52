"""The block-sparse products as torch operators.

    sparsify::dsd, dds, sdd       twice differentiable, since the three are closed under differentiation
    sparsify::activated, gated    forward products that go on in their kernel, for inference alone

Each has a fake implementation (compile, export) and autocast rules. `dispatch` says which kernel runs; Triton is
imported by the first CUDA call, not by this module.
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
_lib.define(
    "activated(Tensor x, Tensor values, Tensor? bias, Tensor[] topology, int out_features, str activation) -> Tensor"
)
_lib.define(
    "gated(Tensor x, Tensor gate, Tensor? gate_bias, Tensor[] gate_topology, Tensor up, Tensor? up_bias, "
    "Tensor[] up_topology, int out_features, str activation) -> Tensor"
)

# Looked up once: these are asked in every call.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_ORDINARY = {Tensor, torch.nn.Parameter}


def plain(*tensors: Tensor) -> bool:
    """Whether nothing watches the call: then it goes to the kernel directly.

    The dispatcher's Python layers cost 30 microseconds a call, and 250 where a gradient is wanted; they are needed
    for tracing (compile, export), functional transforms, dispatch modes and tensor subclasses alone.
    """
    if _is_compiling() or _dispatch_modes() or _transforms() is not None:
        return False
    return _ORDINARY.issuperset(map(type, tensors))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating operand in autocast's dtype, which leaves float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


class Linear(torch.autograd.Function):
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


def _topology(topology: Sequence[Tensor]) -> Topology:
    """The operators take and give lists; a direct call has the tuple already."""
    return topology if type(topology) is Topology else Topology(*topology)


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
    return activated(x, values, bias, topology, out_features, "")


def activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Sequence[Tensor],
    out_features: int,
    activation: str,
    multiply: Tensor | None = None,
) -> Tensor:
    topo = _topology(topology)
    _, block_in, block_out = values.shape
    _check(x, values, x.shape[-1], topo.t_crow.numel() - 1, block_in)
    run = choose("dsd", x, values, (block_in, block_out), out_features)
    if multiply is not None:
        return run(x, values, bias, topo, out_features, activation, multiply)
    if activation:
        return run(x, values, bias, topo, out_features, activation)
    return run(x, values, bias, topo, out_features)


def gated(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    gate_topology: Sequence[Tensor],
    up: Tensor,
    up_bias: Tensor | None,
    up_topology: Sequence[Tensor],
    out_features: int,
    activation: str,
) -> Tensor:
    """Both products in one kernel where there is one for them, else the second with the first as its factor."""
    if gate.shape[1:] == up.shape[1:]:
        gate_topo, up_topo = _topology(gate_topology), _topology(up_topology)
        _, block_in, block_out = gate.shape
        _check(x, gate, x.shape[-1], gate_topo.t_crow.numel() - 1, block_in)
        _check(x, up, x.shape[-1], up_topo.t_crow.numel() - 1, block_in)
        run = choose("gated", x, gate, (block_in, block_out), out_features)
        if run is not None:
            return run(x, gate, gate_bias, gate_topo, up, up_bias, up_topo, out_features, activation)
    y = activated(x, gate, gate_bias, gate_topology, out_features, activation)
    return activated(x, up, up_bias, up_topology, out_features, "", y)


def _dds(dy: Tensor, values: Tensor, topology: Sequence[Tensor], in_features: int) -> Tensor:
    topo = _topology(topology)
    _check(dy, values, dy.shape[-1], topo.crow.numel() - 1, values.shape[2])
    run = choose("dds", dy, values, (values.shape[1], values.shape[2]), in_features)
    return run(dy, values, topo, in_features)


def _sdd(dy: Tensor, x: Tensor, topology: Sequence[Tensor], block_in: int, block_out: int) -> Tensor:
    topo = _topology(topology)
    _check(dy, x, dy.shape[-1], topo.crow.numel() - 1, block_out)
    run = choose("sdd", dy, x, (block_in, block_out), topo.col.numel())
    return run(dy, x, topo, block_in, block_out)


def _fake_dsd(
    x: Tensor, values: Tensor, bias: Tensor | None, topology: Sequence[Tensor], out_features: int
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _fake_activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Sequence[Tensor],
    out_features: int,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _fake_gated(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], args[6])


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
    direct = not torch.is_grad_enabled() and all(plain(dy, t) for t in (x, values) if t is not None)
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


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "this block-sparse product was recorded for inference, with its activation fused, and has no gradient: trace "
        "or export the model with gradients enabled"
    )


def autocasting(name: str, device_type: str, operands: int | None = None) -> Any:
    """Casts the first `operands` arguments (all by default), where they are tensors, to autocast's dtype, as `F.linear`
    does.
    """

    def run(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        cast_args = [cast(a, dtype) if isinstance(a, Tensor) else a for a in args[:operands]]
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.sparsify, name)(*cast_args, *args[len(cast_args) :])

    return run


for _name, _forward, _fake, _save, _backward in (
    ("dsd", _dsd, _fake_dsd, _save_for_dsd, _backward_dsd),
    ("dds", _dds, _fake_dds, _save_for_dds, _backward_dds),
    ("sdd", _sdd, _fake_sdd, _save_for_sdd, _backward_sdd),
    ("activated", activated, _fake_activated, _save_nothing, _no_backward),
    ("gated", gated, _fake_gated, _save_nothing, _no_backward),
):
    _lib.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{_name}", _fake, lib=_lib)
    torch.library.register_autograd(f"sparsify::{_name}", _backward, setup_context=_save, lib=_lib)
    for _key, _device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        _lib.impl(_name, autocasting(_name, _device), _key)
