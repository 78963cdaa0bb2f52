"""Work lists for blocks whose sides are multiples of 64: forward, input gradient and weight gradient.

Two rows of sub-blocks share one program: the halves of one block row where blocks are tall enough, otherwise the two
block rows whose columns overlap most.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sparsify.kernels.schedule import OUTSIDE, SUB, cached, on_device, pairs_by_overlap
from sparsify.kernels.storage import Topology


class Steps(NamedTuple):
    """Work of every row pair, on the GPU as int32; `cost` stays on the host.

    Attributes:
        ptr: `(G + 1,)` first step of each row pair.
        column: `(S + 1,)` which 64 contracted features a step reads.
        first: `(S + 1,)` sub-block of the first row, `-1` where it has none there; counted in `(Z * bi/64, bo/64)`.
        second: `(S + 1,)` the same for the second row.
        first_out: `(G,)` first output feature of the first row.
        second_out: `(G,)` the same for the second row; `-1` where there is no second row.
        paired: Whether a step may lack one of its sub-blocks.
        cost: Steps of each row pair.
    """

    ptr: Tensor
    column: Tensor
    first: Tensor
    second: Tensor
    first_out: Tensor
    second_out: Tensor
    paired: bool
    cost: np.ndarray


def _sub_blocks(
    topo: Topology, block: tuple[int, int], transposed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and number of every stored sub-block, sorted by row and column."""
    high, wide = block[0] // SUB, block[1] // SUB
    position = np.arange(topo.col.numel())[:, None, None]
    down, across = np.arange(high)[None, :, None], np.arange(wide)[None, None, :]
    row = topo.row.cpu().numpy()[:, None, None] * high + down + 0 * across
    column = topo.col.cpu().numpy()[:, None, None] * wide + across + 0 * down
    number = (position * wide + across) * high + down
    row, column, number = row.ravel(), column.ravel(), np.broadcast_to(number, row.shape).ravel()
    if transposed:
        row, column = column, row
    order = np.lexsort((column, row))
    return row[order], column[order], number[order]


def steps(topo: Topology, block: tuple[int, int], transposed: bool) -> Steps:
    """Work of `x W^T`, or of `dy W` if `transposed`; sides of `block` are multiples of 64."""
    return cached(topo, ("steps", block, transposed), lambda: steps_of(topo, block, transposed))


def steps_of(topo: Topology, block: tuple[int, int], transposed: bool) -> Steps:
    """See `steps`; made anew."""
    row, column, number = _sub_blocks(topo, block, transposed)
    grid = (topo.crow.numel() - 1) * (block[0] // SUB), (topo.t_crow.numel() - 1) * (block[1] // SUB)
    rows, columns = grid[::-1] if transposed else grid
    bounds = np.searchsorted(row, np.arange(rows + 1))
    column_of = [column[a:b] for a, b in itertools.pairwise(bounds)]
    number_of = [number[a:b] for a, b in itertools.pairwise(bounds)]
    paired = (block[1] if transposed else block[0]) < 2 * SUB
    pairs = pairs_by_overlap(column_of, columns) if paired else [(i, i + 1) for i in range(0, rows, 2)]
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for i, j in pairs:
        if not paired:
            parts.append((column_of[i], number_of[i], number_of[i + 1]))
            continue
        other_columns = column_of[j] if j is not None else column_of[i][:0]
        other_numbers = number_of[j] if j is not None else number_of[i][:0]
        union = np.union1d(column_of[i], other_columns)
        first, second = np.full(len(union), -1), np.full(len(union), -1)
        first[np.searchsorted(union, column_of[i])] = number_of[i]
        second[np.searchsorted(union, other_columns)] = other_numbers
        parts.append((union, first, second))
    cost = np.array([len(part[0]) for part in parts])
    end = np.zeros(1, dtype=int)  # the kernel reads one step ahead
    column_at, first_at, second_at = (
        on_device(topo, np.concatenate([*(part[i] for part in parts), end])) for i in range(3)
    )
    return Steps(
        ptr=on_device(topo, np.concatenate([end, cost.cumsum()])),
        column=column_at,
        first=first_at,
        second=second_at,
        first_out=on_device(topo, np.array([i * SUB for i, _ in pairs])),
        second_out=on_device(topo, np.array([-1 if j is None else j * SUB for _, j in pairs])),
        paired=paired,
        cost=cost,
    )


class Units(NamedTuple):
    """Work of the weight gradient: `table` `(U, 10)` int32 on the GPU.

    A row holds, for two consumers, the 64 output features `dy0, dy1`, the 64-wide input columns `x00, x01, x10, x11`
    and the sub-blocks to write `w00, w01, w10, w11` (`-1` for none).
    """

    table: Tensor
    shared: bool


def units(topo: Topology, block: tuple[int, int]) -> Units:
    """Work of `dy^T x` at stored blocks; sides of `block` are multiples of 64."""
    return cached(topo, ("units", block), lambda: _units(topo, block))


def _units(topo: Topology, block: tuple[int, int]) -> Units:
    row, column, number = _sub_blocks(topo, block, False)
    shared = block[0] >= 2 * SUB  # both consumers read the same columns, for two rows of one block row
    rows = (topo.crow.numel() - 1) * (block[0] // SUB)
    bounds = np.searchsorted(row, np.arange(rows + 1))
    slots: list[tuple[int, list[int], list[int]]] = []  # a consumer's row, columns and sub-blocks
    for i in range(rows):
        columns, numbers = (
            column[bounds[i] : bounds[i + 1]].tolist(),
            number[bounds[i] : bounds[i + 1]].tolist(),
        )
        odd = len(columns) % 2
        columns, numbers = columns + [OUTSIDE] * odd, numbers + [-1] * odd
        slots += [(i, columns[at : at + 2], numbers[at : at + 2]) for at in range(0, len(columns), 2)]
    if shared:  # two rows of one block row have the same columns, one after the other
        lengths = np.diff(bounds)[::2] + 1 >> 1
        ends = 2 * lengths.cumsum()
        pairs = [
            (slots[at], slots[at + length])
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
            for at in range(end - 2 * length, end - length)
        ]
    else:
        if len(slots) % 2:
            slots.append((slots[-1][0], [OUTSIDE] * 2, [-1] * 2))
        pairs = list(zip(slots[::2], slots[1::2], strict=True))
    table = [[a[0], b[0], *a[1], *b[1], *a[2], *b[2]] for a, b in pairs]
    return Units(on_device(topo, np.array(table, dtype=np.int64).reshape(-1, 10)), shared)
