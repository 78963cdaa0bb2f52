"""Work lists of grouped products: those of every expert's matrix, one after the other, as `work_square` makes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.grouped.reference import matrices
from sparsify.kernels.linear.work_square import steps_of
from sparsify.kernels.schedule import SUB, cached
from sparsify.kernels.storage import Topology


class GroupedSteps(NamedTuple):
    """Work of every row pair of all experts, int32 on the device of the indices.

    Attributes:
        ptr: `(E * G + 1,)` first step of each row pair, those of expert 0 first.
        column: `(S + 1,)` which 64 contracted features a step reads.
        first: `(S + 1,)` sub-block of the first row, `-1` where it has none there; counted in `(Z * bi/64, bo/64)`.
        second: `(S + 1,)` the same for the second row.
        first_out: `(E * G,)` first output feature of the first row.
        second_out: `(E * G,)` the same for the second row; `-1` where there is no second row.
        paired: Whether a step may lack one of its sub-blocks.
        pairs: Row pairs of one expert, `G`.
    """

    ptr: Tensor
    column: Tensor
    first: Tensor
    second: Tensor
    first_out: Tensor
    second_out: Tensor
    paired: bool
    pairs: int


def grouped_steps(topo: Topology, count: int, block: tuple[int, int], transposed: bool) -> GroupedSteps:
    """Work of `W[e] x`, or of `W[e]^T dy` if `transposed`.

    Args:
        topo: Indices of all experts' matrices, see `reference`.
        count: Number of experts, `E`.
        block: `(bo, bi)`, multiples of 64.
        transposed: Which of the two.
    """
    key = ("grouped steps", count, block, transposed)
    return cached(topo, key, lambda: _grouped_steps(topo, count, block, transposed))


def _grouped_steps(topo: Topology, count: int, block: tuple[int, int], transposed: bool) -> GroupedSteps:
    host = Topology(*(index.cpu() for index in topo))
    subs = block[0] // SUB * (block[1] // SUB)
    each, starts = [], []
    for own, matrix in matrices(host, count):
        each.append(steps_of(matrix, block, transposed))
        starts.append(own.start * subs)
    ptr, before = [torch.zeros(1, dtype=torch.int32)], 0
    for work in each:
        ptr.append(work.ptr[1:] + before)
        before += int(work.ptr[-1])
    end = torch.zeros(1, dtype=torch.int32)  # the kernel reads one step ahead

    def numbered(sub: Tensor, start: int) -> Tensor:
        return torch.where(sub >= 0, sub + start, sub)[:-1]

    lists = (
        torch.cat(ptr),
        torch.cat([*(work.column[:-1] for work in each), end]),
        torch.cat([*(numbered(work.first, at) for work, at in zip(each, starts, strict=True)), end]),
        torch.cat([*(numbered(work.second, at) for work, at in zip(each, starts, strict=True)), end]),
        torch.cat([work.first_out for work in each]),
        torch.cat([work.second_out for work in each]),
    )
    on_device = [numbers.to(topo.col.device) for numbers in lists]
    return GroupedSteps(*on_device, paired=each[0].paired, pairs=len(each[0].first_out))
