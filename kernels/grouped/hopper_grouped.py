"""Products with all experts' matrices on Hopper GPUs, for blocks whose sides are multiples of 64 and many slots.

The kernel is that of the linear layer (`hopper_linear`): to it the experts' row pairs are one long list, and its list
of tiles says which of them meets which slots. That list depends on the router, so it is made on the GPU in front of it
(`triton_padding`), in place of the schedule that the linear layer has from the host.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.grouped.reference import Groups
from sparsify.kernels.grouped.triton_padding import Padding, gather, pad, scatter
from sparsify.kernels.grouped.work_grouped import grouped_steps
from sparsify.kernels.hopper_common import descriptor, multiprocessors
from sparsify.kernels.launch import Relaunch
from sparsify.kernels.linear.hopper_linear import linear_kernel
from sparsify.kernels.schedule import plans
from sparsify.kernels.storage import Topology

# Slots of an expert from which on wide tiles are worth their padding.
WIDE = 1536


class _Plan:
    """All of a call that does not depend on what its operands hold or where they lie."""

    def __init__(
        self, place: torch.device, block: tuple[int, int], topo: Topology, count: int, width: int, transposed: bool,
        tile: int,
    ) -> None:  # fmt: skip
        self.work = work = grouped_steps(topo, count, block, transposed)
        self.tile, self.width, self.programs = tile, width, multiprocessors(place)
        self.boxes = (
            partial(descriptor, rows=tile // 2, columns=64),
            partial(descriptor, rows=tile, columns=64),
            lambda values: descriptor(values.view(-1, block[0]), 64, 64),
        )
        self.launch = Relaunch(
            linear_kernel, (self.programs, 1, 1),
            (work.paired, transposed, False, "", block[0] // 64, 4 if tile == 256 else 5, tile),
            place,
            num_warps=4,
        )  # fmt: skip

    def __call__(self, x: Tensor, values: Tensor, groups: Groups) -> tuple[Tensor, Padding]:
        work = self.work
        padding = pad(groups, self.tile, work.pairs, self.programs)
        padded = gather(x, padding)
        y = x.new_empty(padding.rows, self.width)
        result_box, token_box, weight_box = self.boxes
        self.launch(
            (
                y, padding.bins, padding.items,
                work.ptr, work.column, work.first, work.second, work.first_out, work.second_out, self.width,
            ),
            ((result_box, y), (token_box, padded), (weight_box, values)),
        )  # fmt: skip
        return y, padding


def _run(
    x: Tensor, values: Tensor, topo: Topology, groups: Groups, width: int, transposed: bool, tile: int | None
) -> tuple[Tensor, Padding]:
    slots, count = groups.order.numel(), groups.count
    tile = tile or (256 if slots >= WIDE * count else 128)
    key: Hashable = (
        "grouped",
        slots,
        x.shape,
        x.stride(0),
        x.dtype,
        values.shape,
        width,
        transposed,
        tile,
        count,
    )
    kept: dict[Hashable, Any] = plans(topo)
    plan = kept.get(key)
    if plan is None:
        _, block_in, block_out = values.shape
        plan = kept[key] = _Plan(x.device, (block_out, block_in), topo, count, width, transposed, tile)
    return plan(x, values, groups)


def grouped(
    x: Tensor,
    values: Tensor,
    bias: None,
    topo: Topology,
    groups: Groups,
    out_features: int,
    activation: str = "",
    scale: Tensor | None = None,
    gated: bool = False,
    *,
    tile: int | None = None,
) -> Tensor:
    """The forward product without a bias; see `reference.grouped` for shapes. `tile` is 256 or 128 slots."""
    y, padding = _run(x, values, topo, groups, out_features, False, tile)
    return scatter(y, padding, activation, scale, gated)


def grouped_dx(
    dy: Tensor, values: Tensor, topo: Topology, groups: Groups, in_features: int, *, tile: int | None = None
) -> Tensor:
    """The gradient of the input, slot by slot; see `reference.grouped_dx`. `tile` is 256 or 128 slots."""
    return scatter(*_run(dy, values, topo, groups, in_features, True, tile))
