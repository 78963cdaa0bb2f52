"""Work lists of the Hopper kernels: what each warp-specialised program does, in which order.

The kernels work in tiles of 64 output features by 64 contracted features ("sub-blocks"), whatever the block shape is.
Two rows of sub-blocks share one program, and so the activations that it loads: the halves of one block row where
blocks are tall enough, otherwise the two block rows whose columns overlap most. Tiles (row pair x token tile) are
dealt to the multiprocessors by list scheduling, longest first within bands of token tiles that stay in the L2 cache.

Lists depend on the mask, and tiles on the number of token tiles too. Both are made once and kept for as long as the
index tensors live.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sparsify.kernels.storage import Topology

SUB = 64
# What a tile costs besides its steps: filling the pipeline and writing the result, in steps.
TILE_OVERHEAD = 1.5
# Token tiles that are worked on together; their activations stay in the L2 cache.
BAND = 4

T = TypeVar("T")


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


_cache: dict[Hashable, tuple[StorageWeakRef, Any]] = {}


def cached(topo: Topology, key: Hashable, build: Callable[[], T]) -> T:
    """What `build` returns for these index tensors, made at most once while they live and do not change."""
    storage = topo.col.untyped_storage()
    identity = (storage._cdata, topo.col.storage_offset(), topo.col.numel(), topo.col._version, key)
    hit = _cache.get(identity)
    if hit is None or hit[0].expired():
        for stale in [k for k, (ref, _) in _cache.items() if ref.expired()]:
            del _cache[stale]
        hit = _cache[identity] = (StorageWeakRef(storage), build())
    return hit[1]


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


def _pairs_by_overlap(rows: list[np.ndarray], columns: int) -> list[tuple[int, int | None]]:
    """Pairs rows greedily, longest first, each with the row that shares most of its columns."""
    present = np.zeros((len(rows), columns), dtype=np.float32)
    for i, row in enumerate(rows):
        present[i, row] = 1
    overlap = present @ present.T
    np.fill_diagonal(overlap, -1)
    pairs: list[tuple[int, int | None]] = []
    free = np.ones(len(rows), dtype=bool)
    for i in np.argsort(-present.sum(1), kind="stable"):
        if free[i]:
            free[i] = False
            partner = int(np.argmax(np.where(free, overlap[i], -1))) if free.any() else None
            if partner is not None:
                free[partner] = False
            pairs.append((int(i), partner))
    return pairs


def steps(topo: Topology, block: tuple[int, int], transposed: bool) -> Steps:
    """Work of `x W^T`, or of `dy W` if `transposed`; sides of `block` are multiples of 64."""
    return cached(topo, ("steps", block, transposed), lambda: _steps(topo, block, transposed))


def _steps(topo: Topology, block: tuple[int, int], transposed: bool) -> Steps:
    row, column, number = _sub_blocks(topo, block, transposed)
    grid = (topo.crow.numel() - 1) * (block[0] // SUB), (topo.t_crow.numel() - 1) * (block[1] // SUB)
    rows, columns = grid[::-1] if transposed else grid
    bounds = np.searchsorted(row, np.arange(rows + 1))
    column_of = [column[a:b] for a, b in itertools.pairwise(bounds)]
    number_of = [number[a:b] for a, b in itertools.pairwise(bounds)]
    paired = (block[1] if transposed else block[0]) < 2 * SUB
    pairs = _pairs_by_overlap(column_of, columns) if paired else [(i, i + 1) for i in range(0, rows, 2)]
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
        _on(topo, np.concatenate([*(part[i] for part in parts), end])) for i in range(3)
    )
    return Steps(
        ptr=_on(topo, np.concatenate([end, cost.cumsum()])),
        column=column_at,
        first=first_at,
        second=second_at,
        first_out=_on(topo, np.array([i * SUB for i, _ in pairs])),
        second_out=_on(topo, np.array([-1 if j is None else j * SUB for _, j in pairs])),
        paired=paired,
        cost=cost,
    )


class TallSteps(NamedTuple):
    """Work of block rows at least 128 high and less than 64 wide, in steps of 64 packed columns.

    Attributes:
        ptr: `(G + 1,)` first step of each group of 128 output features.
        panel: `(G,)` first row of the group's panel in the values `(Z * bi, bo)`.
        panel_column: `(G,)` first column there.
        column: `(S * 64 / bi,)` block column of each packed block; far outside where a panel ends within a step.
        out: `(G,)` first output feature.
        cost: Steps of each group.
    """

    ptr: Tensor
    panel: Tensor
    panel_column: Tensor
    column: Tensor
    out: Tensor
    cost: np.ndarray


# Columns this far out are read as zeros by the copy engine, for any weight that fits 32-bit block indices.
OUTSIDE = 1 << 24


def tall_steps(topo: Topology, block: tuple[int, int]) -> TallSteps:
    """Work of `x W^T` for tall, narrow blocks."""
    return cached(topo, ("tall", block), lambda: _tall_steps(topo, block))


def _tall_steps(topo: Topology, block: tuple[int, int]) -> TallSteps:
    per_step, halves = SUB // block[1], block[0] // 128
    crow, col = topo.crow.cpu().numpy(), topo.col.cpu().numpy()
    columns, cost = [], []
    for begin, end in itertools.pairwise(crow):
        count = -(-(end - begin) // per_step)
        padded = np.full(count * per_step, OUTSIDE)
        padded[: end - begin] = col[begin:end]
        columns += [padded] * halves
        cost += [count] * halves
    rows = len(crow) - 1
    costs = np.array(cost)
    return TallSteps(
        _on(topo, np.concatenate([[0], costs.cumsum()])),
        _on(topo, np.repeat(crow[:-1] * block[1], halves)),
        _on(topo, np.tile(np.arange(halves) * 128, rows)),
        _on(topo, np.concatenate([*columns, [OUTSIDE]])),
        _on(topo, np.arange(rows * halves) * 128),
        costs,
    )


def tiles(
    topo: Topology, key: Hashable, cost: np.ndarray, token_tiles: int, programs: int
) -> tuple[Tensor, Tensor]:
    """Deals the tiles of `token_tiles` token tiles to programs.

    Args:
        topo: Indices of the weight, for the cache and the device.
        key: Names the work list that `cost` belongs to.
        cost: Steps of each group of output features.
        token_tiles: Tiles of tokens.
        programs: Programs that run at a time.

    Returns:
        `(P + 1,)` first tile of each program and `(tiles,)` `group + (token tile << 16)`, int32.
    """
    identity = ("tiles", key, token_tiles, programs)
    return cached(topo, identity, lambda: _tiles(topo, cost, token_tiles, programs))


def _tiles(topo: Topology, cost: np.ndarray, token_tiles: int, programs: int) -> tuple[Tensor, Tensor]:
    longest_first = np.argsort(-cost, kind="stable").tolist()
    duration = (cost + TILE_OVERHEAD).tolist()
    programs = min(programs, len(duration) * token_tiles)
    dealt: list[list[int]] = [[] for _ in range(programs)]
    busy_until = [(0.0, program) for program in range(programs)]
    for band in range(0, token_tiles, BAND):
        for group in longest_first:
            for tile in range(band, min(band + BAND, token_tiles)):
                busy, program = busy_until[0]
                dealt[program].append(group | tile << 16)
                heapq.heapreplace(busy_until, (busy + duration[group], program))
    bounds = np.cumsum([0] + [len(own) for own in dealt])
    return _on(topo, bounds), _on(topo, np.array([tile for own in dealt for tile in own]))


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
    table: list[list[int]] = []
    width = 2 if shared else 4
    for i in range(0, rows, 2 if shared else 1):
        columns, numbers = (
            column[bounds[i] : bounds[i + 1]].tolist(),
            number[bounds[i] : bounds[i + 1]].tolist(),
        )
        below = number[bounds[i + 1] : bounds[i + 2]].tolist() if shared else []
        for at in range(0, len(columns), width):
            x = columns[at : at + width] + [OUTSIDE] * (width - len(columns[at : at + width]))
            w = numbers[at : at + width] + [-1] * (width - len(numbers[at : at + width]))
            if shared:
                lower = below[at : at + width] + [-1] * (width - len(below[at : at + width]))
                table.append([i, i + 1, *x, *x, *w, *lower])
            else:
                table.append([i, i, *x, *w])
    return Units(_on(topo, np.array(table, dtype=np.int64).reshape(-1, 10)), shared)


def _on(topo: Topology, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(topo.col.device)
