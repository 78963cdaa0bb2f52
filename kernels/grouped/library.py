"""The grouped block-sparse products as torch operators, and the sorting of slots that comes before them.

    sparsify::group                            slots by expert
    sparsify::grouped, grouped_dx, grouped_dw  twice differentiable, since the three are closed under differentiation
    sparsify::grouped_activated                what may follow the forward product in its kernel, for inference alone

Each has a fake implementation (compile, export), the products have autocast rules; see `linear.library`. On a GPU the
Triton kernels run them, elsewhere and in float64 the torch reference (which there waits for the GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.dispatch import choose_grouped
from sparsify.kernels.grouped import reference as grouped_reference
from sparsify.kernels.grouped.reference import Groups, experts_of
from sparsify.kernels.linear.library import autocasting, plain
from sparsify.kernels.linear.reference import activate_
from sparsify.kernels.storage import Topology

_lib = torch.library.Library("sparsify", "FRAGMENT")
_lib.define("group(Tensor experts, int count) -> (Tensor, Tensor)")
_lib.define(
    "grouped(Tensor x, Tensor values, Tensor? bias, Tensor[] topology, Tensor[] groups, int out_features) -> Tensor"
)
_lib.define(
    "grouped_activated(Tensor x, Tensor values, Tensor? bias, Tensor? scale, Tensor[] topology, Tensor[] groups, "
    "int out_features, str activation, bool gated) -> Tensor"
)
_lib.define(
    "grouped_dx(Tensor dy, Tensor values, Tensor[] topology, Tensor[] groups, int in_features) -> Tensor"
)
_lib.define(
    "grouped_dw(Tensor dy, Tensor x, Tensor[] topology, Tensor[] groups, int block_in, int block_out) -> Tensor"
)


class Grouped(torch.autograd.Function):
    """`grouped` with its gradients, for eager mode; its backward pass is differentiable too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, out_features: int, *indices: Tensor
    ) -> Tensor:
        topo, groups = indices[:-2], indices[-2:]
        _save_for_grouped(ctx, (x, values, bias, topo, groups, out_features), x)
        return grouped(x, values, bias, topo, groups, out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dx, dvalues, dbias, topo, groups, _ = _backward_grouped(ctx, grads[0])
        return dx, dvalues, dbias, None, *topo, *groups


def _check(
    left: Tensor, right: Tensor, topo: Topology, groups: Groups, side: int, transposed: bool, slots: bool
) -> None:
    """The one place where operands are checked.

    Args:
        left: Activations or their gradient.
        right: The other operand.
        topo: Indices of all matrices.
        groups: Slots by expert.
        side: Of a block, along the columns of `left`.
        transposed: Whether the columns of `left` are output features.
        slots: Whether `left` has one row a slot; else a whole number of slots may share a row.
    """
    count, rows = groups.count, left.shape[0]
    if left.dim() != 2 or left.dtype != right.dtype:
        raise ValueError(
            f"grouped block-sparse product of {tuple(left.shape)} {left.dtype} with {tuple(right.shape)} "
            f"{right.dtype}: expected a matrix and operands of one dtype"
        )
    lists = topo.t_crow.numel()
    if count < 1 or (topo.crow.numel() - 1) % count or lists % count:
        raise ValueError(
            f"grouped block-sparse product: {topo.crow.numel() - 1} block rows are not those of {count} matrices"
        )
    total = groups.order.numel()
    if (total != rows) if slots else (total % rows if rows else total):
        raise ValueError(f"grouped block-sparse product: {total} slots do not fit {rows} rows of activations")
    blocks = (topo.crow.numel() - 1) // count if transposed else lists // count - 1
    if not (blocks - 1) * side < left.shape[1] <= blocks * side:
        raise ValueError(
            f"grouped block-sparse product: got {left.shape[1]} features, expected {(blocks - 1) * side + 1} to "
            f"{blocks * side} ({blocks} blocks of {side})"
        )


def group(experts: Tensor, count: int) -> Groups:
    """See `reference.group`; on a GPU few slots are sorted by one kernel."""
    if experts.is_cuda:
        return import_module("sparsify.kernels.grouped.triton_grouped").group(experts, count)
    return grouped_reference.group(experts, count)


def grouped(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Sequence[Tensor],
    groups: Sequence[Tensor],
    out_features: int,
) -> Tensor:
    return activated(x, values, bias, None, topology, groups, out_features, "", False)


def activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    topology: Sequence[Tensor],
    groups: Sequence[Tensor],
    out_features: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """The forward product and what follows it, see `reference.grouped`: in one kernel where the halves of a
    gated product begin with a block row.

    Raises:
        ValueError: If the operands do not fit each other.
    """
    topo, slots = Topology(*topology), Groups(*groups)
    _, block_in, block_out = values.shape
    _check(x, values, topo, slots, block_in, False, False)
    run = choose_grouped("grouped", x, values, bias, slots, out_features)
    # Only the portable kernel cares where the second half begins.
    if not gated or out_features % (2 * block_out) == 0 or not run.__module__.endswith("triton_grouped"):
        return run(x, values, bias, topo, slots, out_features, activation, scale, gated)
    both, half = run(x, values, bias, topo, slots, out_features), out_features // 2
    y = activate_(both[:, :half].contiguous(), activation).mul_(both[:, half:])
    return y if scale is None else y.mul_(scale[:, None])


def _grouped_dx(
    dy: Tensor, values: Tensor, topology: Sequence[Tensor], groups: Sequence[Tensor], in_features: int
) -> Tensor:
    topo, slots = Topology(*topology), Groups(*groups)
    _check(dy, values, topo, slots, values.shape[2], True, True)
    run = choose_grouped("grouped_dx", dy, values, None, slots, in_features)
    return run(dy, values, topo, slots, in_features)


def _grouped_dw(
    dy: Tensor,
    x: Tensor,
    topology: Sequence[Tensor],
    groups: Sequence[Tensor],
    block_in: int,
    block_out: int,
) -> Tensor:
    topo, slots = Topology(*topology), Groups(*groups)
    _check(dy, x, topo, slots, block_out, True, True)
    _check(x, dy, topo, slots, block_in, False, False)
    run = choose_grouped("grouped_dw", x, None, None, slots, 0)
    return run(dy, x, topo, slots, block_in, block_out)


def _fake_group(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    order = experts.new_empty(experts.shape[0], dtype=torch.int32)
    return order, experts.new_empty(count + 1, dtype=torch.int32)


def _fake_grouped(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Sequence[Tensor],
    groups: Sequence[Tensor],
    out_features: int,
) -> Tensor:
    return x.new_empty(groups[0].shape[0], out_features)


def _fake_activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    topology: Sequence[Tensor],
    groups: Sequence[Tensor],
    out_features: int,
    activation: str,
    gated: bool,
) -> Tensor:
    return x.new_empty(groups[0].shape[0], out_features // 2 if gated else out_features)


def _fake_dx(
    dy: Tensor, values: Tensor, topology: Sequence[Tensor], groups: Sequence[Tensor], in_features: int
) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


def _fake_dw(
    dy: Tensor,
    x: Tensor,
    topology: Sequence[Tensor],
    groups: Sequence[Tensor],
    block_in: int,
    block_out: int,
) -> Tensor:
    return x.new_empty(topology[1].shape[0], block_in, block_out)


def _save(ctx: Any, operands: tuple[Tensor | None, ...], topo: Sequence[Tensor], groups: Sequence[Tensor]):
    ctx.save_for_backward(*operands, *topo, *groups)


def _saved(ctx: Any) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
    left, right, *indices = ctx.saved_tensors
    return left, right, indices[:-2], indices[-2:]


def _per_token(dx: Tensor, tokens: int) -> Tensor:
    """`(S, K)` gradients summed over the slots of each token, `(T, K)`."""
    slots, features = dx.shape
    return dx if slots == tokens else dx.view(tokens, slots // tokens, features).sum(1)


def _bias_gradient(dy: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """`(E, N)` sums over the slots of each expert: as a product, which adds up in the same order in every run."""
    slots = Groups(*groups)
    chosen = experts_of(slots) == torch.arange(slots.count, device=dy.device)[:, None]  # [E, S]
    return chosen.to(dy.dtype) @ dy


def _save_for_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, topology, groups, _out_features = inputs
    # Each operand is needed only for the other's gradient: a frozen weight keeps no activations alive.
    _save(ctx, (x if values.requires_grad else None, values if x.requires_grad else None), topology, groups)
    ctx.size, ctx.block, ctx.has_bias = x.shape, values.shape[1:], bias is not None


def _backward_grouped(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, topology, groups = _saved(ctx)
    dy = dy.contiguous()  # the gradient of a sum is expanded
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    # Called directly unless somebody traces the backward pass or wants to differentiate it.
    direct = not torch.is_grad_enabled() and all(plain(dy, t) for t in (x, values) if t is not None)
    ops = torch.ops.sparsify
    run_dx, run_dw = (_grouped_dx, _grouped_dw) if direct else (ops.grouped_dx, ops.grouped_dw)
    tokens, in_features = ctx.size
    dx = _per_token(run_dx(dy, values, topology, groups, in_features), tokens) if need_x else None
    dvalues = run_dw(dy, x, topology, groups, *ctx.block) if need_values else None
    dbias = _bias_gradient(dy, groups) if ctx.has_bias and need_bias else None
    return dx, dvalues, dbias, [None] * len(topology), [None] * len(groups), None


def _save_for_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, values, topology, groups, _ = inputs
    _save(ctx, (dy, values), topology, groups)


def _backward_dx(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, values, topology, groups = _saved(ctx)
    need_dy, need_values = ctx.needs_input_grad[:2]
    ops, grad = torch.ops.sparsify, grad.contiguous()
    ddy = ops.grouped(grad, values, None, topology, groups, dy.shape[1]) if need_dy else None
    dvalues = ops.grouped_dw(dy, grad, topology, groups, *values.shape[1:]) if need_values else None
    return ddy, dvalues, [None] * len(topology), [None] * len(groups), None


def _save_for_dw(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, topology, groups, _, _ = inputs
    _save(ctx, (dy, x), topology, groups)


def _backward_dw(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, x, topology, groups = _saved(ctx)
    need_dy, need_x = ctx.needs_input_grad[:2]
    ops, grad = torch.ops.sparsify, grad.contiguous()
    ddy = ops.grouped(x, grad, None, topology, groups, dy.shape[1]) if need_dy else None
    dx = None
    if need_x:
        dx = _per_token(ops.grouped_dx(dy, grad, topology, groups, x.shape[1]), x.shape[0])
    return ddy, dx, [None] * len(topology), [None] * len(groups), None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "these experts were recorded for inference, with their activation fused, and have no gradient: trace or export "
        "the model with gradients enabled"
    )


_lib.impl("group", lambda experts, count: tuple(group(experts, count)), "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::group", _fake_group, lib=_lib)

for _name, _forward, _fake, _setup, _backward in (
    ("grouped", grouped, _fake_grouped, _save_for_grouped, _backward_grouped),
    ("grouped_activated", activated, _fake_activated, _save_nothing, _no_backward),
    ("grouped_dx", _grouped_dx, _fake_dx, _save_for_dx, _backward_dx),
    ("grouped_dw", _grouped_dw, _fake_dw, _save_for_dw, _backward_dw),
):
    _lib.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{_name}", _fake, lib=_lib)
    torch.library.register_autograd(f"sparsify::{_name}", _backward, setup_context=_setup, lib=_lib)
    for _key, _device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        # The two factors and the bias; what scales the result stays.
        _lib.impl(_name, autocasting(_name, _device, 3), _key)
