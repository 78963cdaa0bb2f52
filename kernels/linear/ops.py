"""Linear layer and gated MLP with block-sparse weights: the functions that modules call.

Both work under autograd, `torch.compile` with `fullgraph=True`, `torch.export`, autocast and CUDA graphs. An ordinary
eager call goes straight to its kernel; everything else goes through the torch operators that `library` registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.kernels.linear import library
from sparsify.kernels.linear.library import plain
from sparsify.kernels.linear.reference import ACTIVATIONS
from sparsify.kernels.storage import Topology


class Operand(NamedTuple):
    """A block-sparse weight with its bias.

    Attributes:
        values: `(Z, bi, bo)` packed blocks.
        bias: `(N,)` or `None`.
        topo: Indices of the weight, on the device of `values`.
    """

    values: Tensor
    bias: Tensor | None
    topo: Topology


def block_sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, out_features: int, activation: str = ""
) -> Tensor:
    """`y = activation(x W^T + bias)` with a block-sparse weight.

    Without gradients the activation is part of the product's kernel; with them it is torch's own, after it.

    Args:
        x: `(..., K)` activations, floating point.
        values: `(Z, bi, bo)` packed blocks, the dtype and device of `x` (autocast casts both).
        bias: `(N,)` or `None`.
        topo: Indices of the weight, on the device of `x`.
        out_features: `N`.
        activation: One of `reference.ACTIVATIONS`: `""` (none), `relu`, `gelu`, `gelu_tanh`, `silu`.

    Returns:
        `(..., N)`.

    Raises:
        ValueError: If dtypes or the last dimension of `x` do not fit, or the activation is unknown.
    """
    if activation:
        _check_activation(activation)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    differentiable = torch.is_grad_enabled() and (x.requires_grad or _wanted(values, bias))
    if not plain(x, values):
        if activation and not differentiable:
            y = torch.ops.sparsify.activated(flat, values, bias, list(topo), out_features, activation)
        else:
            y = torch.ops.sparsify.dsd(flat, values, bias, list(topo), out_features)
            y = _activate(y, activation)
    else:
        if _any_autocast():
            flat, values, bias = _autocast(flat, values, bias)
        if differentiable:
            y = _activate(library.Linear.apply(flat, values, bias, out_features, *topo), activation)
        else:
            y = library.activated(flat, values, bias, topo, out_features, activation)
    return _like(y, x)


def block_sparse_gated(x: Tensor, gate: Operand, up: Operand, out_features: int, activation: str) -> Tensor:
    """`y = activation(x Wg^T + bg) * (x Wu^T + bu)`: gate and up projection of a gated MLP.

    Without gradients the product is part of the kernels; with them it is torch's own, after them.

    Args:
        x: `(..., K)` activations, floating point.
        gate: The gate's weight, `(N, K)`, the dtype and device of `x` (autocast casts both).
        up: The other weight, `(N, K)`, likewise; its blocks may have another shape.
        out_features: `N`.
        activation: One of `reference.ACTIVATIONS`.

    Returns:
        `(..., N)`.

    Raises:
        ValueError: If dtypes or the last dimension of `x` do not fit, or the activation is unknown.
    """
    _check_activation(activation)
    if torch.is_grad_enabled() and (x.requires_grad or _wanted(*gate[:2]) or _wanted(*up[:2])):
        y = _activate(block_sparse_linear(x, *gate, out_features), activation)
        return y * block_sparse_linear(x, *up, out_features)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    gate_values, gate_bias, gate_topo = gate
    up_values, up_bias, up_topo = up
    if plain(x, gate_values, up_values):
        if _any_autocast():
            flat, gate_values, gate_bias, up_values, up_bias = _autocast(
                flat, gate_values, gate_bias, up_values, up_bias
            )
        run = library.gated
    else:
        run, gate_topo, up_topo = torch.ops.sparsify.gated, list(gate_topo), list(up_topo)
    y = run(flat, gate_values, gate_bias, gate_topo, up_values, up_bias, up_topo, out_features, activation)
    return _like(y, x)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(name for name in ACTIVATIONS if name)
        raise ValueError(f"unknown activation {activation!r}: expected one of {known}, or '' for none")


def _activate(y: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS` by torch's own differentiable function."""
    if activation == "relu":
        return F.relu(y)
    if activation == "silu":
        return F.silu(y)
    if activation:
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y


def _wanted(values: Tensor, bias: Tensor | None) -> bool:
    """Whether a weight or its bias wants a gradient."""
    return values.requires_grad or (bias is not None and bias.requires_grad)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """Gives the rows of `y` the leading dimensions of `x`."""
    shape = x.shape
    if len(shape) == 2:
        return y
    # The usual shape first: unpacking one of any length takes twice as long.
    return y.view(shape[0], shape[1], y.shape[1]) if len(shape) == 3 else y.view(*shape[:-1], y.shape[1])


_any_autocast = torch._C._is_any_autocast_enabled


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """The operands in autocast's dtype, if autocast is on for their device."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None else library.cast(tensor, dtype) for tensor in tensors)
