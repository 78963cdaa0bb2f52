"""Products with several block-sparse matrices in plain torch: the CPU path, and the oracle of the Triton kernels.

A mixture of experts has one matrix an expert, and a router that sends each token to a few of them. A *slot* is one pair
of a token and an expert: with `k` experts a token, slots `k t` to `k t + k - 1` are those of token `t`. With the matrix
`W[e]` `(N, K)` of expert `e`:

    grouped:     y[s]  = W[e(s)] x[s // k] + bias[e(s)]      (S, N)
    grouped_dx:  dx[s] = W[e(s)]^T dy[s]                     (S, K), not yet summed over the slots of a token
    grouped_dw:  dW[e] = sum over the slots of e of          dy[s] x[s // k]^T, at stored blocks only

Results of a slot that no expert has are zero.

The matrices are stored one after the other: values `(Z, bi, bo)` are the blocks of expert 0, then those of expert 1,
and so on. `topo.crow` `(E * R + 1,)` counts through all of them; `t_crow` `(E * (C + 1),)` and `t_block` count anew in
each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.linear import reference
from sparsify.kernels.storage import Topology


class Groups(NamedTuple):
    """Slots by their expert, all int32 on one device.

    Attributes:
        order: `(S,)` every slot once: those of expert 0, of expert 1, ..., and last those that no expert has.
        offsets: `(E + 1,)` where in `order` each expert's slots begin, and where the last one's end.
    """

    order: Tensor
    offsets: Tensor

    @property
    def count(self) -> int:
        """Number of experts, `E`."""
        return self.offsets.numel() - 1


def group(experts: Tensor, count: int) -> Groups:
    """Sorts slots by expert, stably and without waiting for a GPU.

    Args:
        experts: `(S,)` integers, the expert of each slot; `count` or more means none.
        count: Number of experts, `E`.
    """
    narrow = (
        torch.int16 if count < torch.iinfo(torch.int16).max else torch.int32
    )  # fewer passes of a radix sort
    ordered, order = torch.sort(experts.clamp(max=count).to(narrow), stable=True)
    bounds = torch.arange(count + 1, dtype=narrow, device=experts.device)
    return Groups(order.to(torch.int32), torch.searchsorted(ordered, bounds, out_int32=True))


def experts_of(groups: Groups) -> Tensor:
    """`(S,)` int64: the expert of each slot, `E` for those that no expert has."""
    places = torch.arange(groups.order.numel(), dtype=torch.int32, device=groups.order.device)
    experts = torch.empty_like(groups.order, dtype=torch.int64)
    experts[groups.order.long()] = torch.searchsorted(groups.offsets[1:].contiguous(), places, right=True)
    return experts


def slots_per_token(slots: int, tokens: int) -> int:
    """`k`, how many slots each row of the activations has."""
    return slots // tokens if tokens else 1


def matrices(topo: Topology, count: int) -> Iterator[tuple[slice, Topology]]:
    """Which blocks are those of each of `count` matrices, and its own indices."""
    rows, lists = (topo.crow.numel() - 1) // count, topo.t_crow.numel() // count
    starts = topo.crow[::rows].tolist()
    for expert in range(count):
        own = slice(starts[expert], starts[expert + 1])
        crow = topo.crow[expert * rows : (expert + 1) * rows + 1] - own.start
        t_crow = topo.t_crow[expert * lists : (expert + 1) * lists]
        indices = topo.col[own], topo.row[own], t_crow, topo.t_row[own], topo.t_block[own]
        yield own, Topology(crow, *indices)


def _each(topo: Topology, groups: Groups) -> Iterator[tuple[int, Tensor, slice, Topology]]:
    """Expert, its slots, its blocks and the indices of its matrix, for each expert that has slots."""
    bounds, order = groups.offsets.tolist(), groups.order.long()
    for expert, (own, matrix) in enumerate(matrices(topo, groups.count)):
        slots = order[bounds[expert] : bounds[expert + 1]]
        if len(slots):
            yield expert, slots, own, matrix


def grouped(
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
    """`y[s] = scale[s] * activation(W[e(s)] x[s // k] + bias[e(s)])`.

    Args:
        x: `(T, K)`, for `S = k T` slots.
        values: `(Z, bi, bo)`, the dtype of `x`.
        bias: `(E, N)` or `None`.
        topo: Indices of all matrices.
        groups: Slots by expert.
        out_features: `N`.
        activation: One of `linear.reference.ACTIVATIONS`.
        scale: `(S,)` or `None`.
        gated: Whether the first half of the `N` features goes through the activation and is multiplied by the second
            half, which does not.

    Returns:
        `(S, N)`, `(S, N / 2)` if `gated`, contiguous.
    """
    top = slots_per_token(groups.order.numel(), x.shape[0])
    y = x.new_zeros(groups.order.numel(), out_features)
    for expert, slots, own, matrix in _each(topo, groups):
        own_bias = None if bias is None else bias[expert]
        own_activation = "" if gated else activation
        y[slots] = reference.dsd(x[slots // top], values[own], own_bias, matrix, out_features, own_activation)
    if gated:
        half = out_features // 2
        y = reference.activate_(y[:, :half].contiguous(), activation).mul_(y[:, half:])
    return y if scale is None else y.mul_(scale[:, None])


def grouped_dx(dy: Tensor, values: Tensor, topo: Topology, groups: Groups, in_features: int) -> Tensor:
    """`dx[s] = W[e(s)]^T dy[s]`.

    Args:
        dy: `(S, N)`.
        values: `(Z, bi, bo)`, the dtype of `dy`.
        topo: Indices of all matrices.
        groups: Slots by expert.
        in_features: `K`.

    Returns:
        `(S, K)`, contiguous.
    """
    dx = dy.new_zeros(dy.shape[0], in_features)
    for _, slots, own, matrix in _each(topo, groups):
        dx[slots] = reference.dds(dy[slots], values[own], matrix, in_features)
    return dx


def grouped_dw(
    dy: Tensor, x: Tensor, topo: Topology, groups: Groups, block_in: int, block_out: int
) -> Tensor:
    """`dW[e] = sum of dy[s] x[s // k]^T` over the slots of each expert, at stored blocks only.

    Args:
        dy: `(S, N)`.
        x: `(T, K)`, the dtype of `dy`.
        topo: Indices of all matrices.
        groups: Slots by expert.
        block_in: `bi`.
        block_out: `bo`.

    Returns:
        `(Z, bi, bo)`, contiguous; zero for experts without slots and in the padding.
    """
    top = slots_per_token(dy.shape[0], x.shape[0])
    dw = x.new_zeros(topo.col.numel(), block_in, block_out)
    for _, slots, own, matrix in _each(topo, groups):
        dw[own] = reference.sdd(dy[slots], x[slots // top], matrix, block_in, block_out)
    return dw
