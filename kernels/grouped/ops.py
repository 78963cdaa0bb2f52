"""Grouped linear layers with block-sparse weights, as a mixture of experts has them: the functions that modules call.

They work under autograd, `torch.compile` with `fullgraph=True`, `torch.export`, autocast and CUDA graphs, as
`linear.ops.block_sparse_linear` does; what a *slot* is, `reference` says. All experts are one kernel launch, which
reads the weights of those alone that have slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.grouped import library as grouped_library
from sparsify.kernels.grouped.reference import Groups
from sparsify.kernels.linear.library import cast, plain
from sparsify.kernels.linear.reference import ACTIVATIONS
from sparsify.kernels.storage import Topology


def group_by_expert(experts: Tensor, count: int) -> Groups:
    """Sorts slots by expert, stably and without waiting for a GPU.

    Args:
        experts: `(S,)` integers, the expert of each slot; `count` or more means none.
        count: Number of experts, `E`.
    """
    if plain(experts):
        return grouped_library.group(experts, count)
    return Groups(*torch.ops.sparsify.group(experts, count))


def block_sparse_grouped(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, groups: Groups, out_features: int
) -> Tensor:
    """`y[s] = W[e(s)] x[s // k] + bias[e(s)]` for every slot `s` of a mixture of block-sparse experts.

    Args:
        x: `(T, K)` activations, floating point; `S = k T` for a whole number `k`. With `k` = 1 each slot has its own.
        values: `(Z, bi, bo)` packed blocks of all experts, the dtype and device of `x` (autocast casts both).
        bias: `(E, N)` or `None`.
        topo: Indices of all experts, see `reference`, on the device of `x`.
        groups: The `S` slots by expert.
        out_features: `N`.

    Returns:
        `(S, N)`; zero for slots that no expert has.

    Raises:
        ValueError: If dtypes, slots or features do not fit.
    """
    if not plain(x, values):
        return torch.ops.sparsify.grouped(x, values, bias, list(topo), list(groups), out_features)
    x, values, bias = _autocast(x, values, bias)
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and wanted:
        run = grouped_library.Grouped.apply
        return run(x, values, bias, out_features, *topo, *groups)  # pyright: ignore[reportReturnType]
    return grouped_library.grouped(x, values, bias, topo, groups, out_features)


def block_sparse_grouped_activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topo: Topology,
    groups: Groups,
    out_features: int,
    activation: str = "",
    scale: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`block_sparse_grouped` and what follows it, in its kernel: for inference, without gradients.

    Args:
        x: See `block_sparse_grouped`; so are `values`, `bias`, `topo`, `groups` and `out_features`.
        values: Packed blocks.
        bias: `(E, N)` or `None`.
        topo: Indices.
        groups: Slots by expert.
        out_features: `N`, of a gated product both halves together.
        activation: One of `linear.reference.ACTIVATIONS`.
        scale: `(S,)` factors of the results, floating point, or `None`.
        gated: Whether the first `N / 2` features go through the activation and are multiplied by the others, which do
            not: `activation(gate) * up`.

    Returns:
        `(S, N)`, `(S, N / 2)` if `gated`.

    Raises:
        ValueError: If dtypes, slots or features do not fit, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(name for name in ACTIVATIONS if name)
        raise ValueError(f"unknown activation {activation!r}: expected one of {known}, or '' for none")
    if gated and out_features % 2:
        raise ValueError(f"a gated product has two halves: got {out_features} features")
    if not plain(x, values):
        run = torch.ops.sparsify.grouped_activated
        return run(x, values, bias, scale, list(topo), list(groups), out_features, activation, gated)
    x, values, bias = _autocast(x, values, bias)
    return grouped_library.activated(x, values, bias, scale, topo, groups, out_features, activation, gated)


def _autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype, if autocast is on for their device."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, values, bias
    dtype = torch.get_autocast_dtype(device)
    return cast(x, dtype), cast(values, dtype), None if bias is None else cast(bias, dtype)
