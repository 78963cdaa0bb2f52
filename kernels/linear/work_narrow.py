"""Work lists for blocks with a side of 16 or 32: stacks of 64 output features, whose columns are united."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsify.kernels.schedule import OUTSIDE, SUB, cached, on_device, pairs_by_overlap
from sparsify.kernels.storage import Topology


class Stacks(NamedTuple):
    """Work of blocks with a side below 64: stacks of 64 output features, two to a program.

    A step reads 64 contracted features in parts of `part`. A pair's steps come in three runs: columns that both stacks
    have, those of the first alone and those of the second alone.

    Attributes:
        bound: `(G, 4)` first step of a pair, ends of its first two runs, and its end.
        panel: `(G, 4)` where the weights of both stacks begin: rows in the panels, and the column there; and how many
            parts of the last step are theirs, where what follows in the panels is another's.
        column: `(S * 64 / part,)` first contracted feature of each part; far outside where a run ends within a step.
        out: `(G, 2)` first output feature of both stacks; `-1` where there is no second stack.
        source: `(P, 64 / high)` int64, where each piece of the panels is copied from, `part` contracted features by
            `high` output features: offset in the values, or `-1` for zeros. `None` where the panels are the values.
        part: Contracted features of a part, 16 to 64.
        high: Output features of a block in a stack, 16 to 64.
        cost: Steps of each pair.
    """

    bound: Tensor
    panel: Tensor
    column: Tensor
    out: Tensor
    source: Tensor | None
    part: int
    high: int
    cost: np.ndarray


def stacks(topo: Topology, block: tuple[int, int], transposed: bool) -> Stacks:
    """Work of `x W^T`, or of `dy W` if `transposed`, where a side of the block is 16 or 32."""
    build = _tall if block[0] >= 2 * SUB and not transposed else _stacks
    return cached(topo, ("stacks", block, transposed), lambda: build(topo, block, transposed))


def _tall(topo: Topology, block: tuple[int, int], transposed: bool) -> Stacks:
    """Block rows at least 128 high are panels as they are; a pair is 128 rows of one, and has all columns in common."""
    per_step, halves = SUB // block[1], block[0] // 128
    crow, col = topo.crow.cpu().numpy(), topo.col.cpu().numpy()
    columns, cost, valid = [], [], []
    for begin, end in itertools.pairwise(crow):
        count = -(-(end - begin) // per_step)
        valid += [end - begin - (count - 1) * per_step] * halves
        padded = np.full(count * per_step, OUTSIDE)
        padded[: end - begin] = col[begin:end] * block[1]
        columns += [padded] * halves
        cost += [count] * halves
    pairs, costs = len(cost), np.array(cost)
    ends = costs.cumsum()
    row, out = np.repeat(crow[:-1] * block[1], halves), np.arange(pairs) * 128
    return Stacks(
        bound=on_device(topo, np.column_stack([ends - costs, ends, ends, ends])),
        panel=on_device(topo, np.column_stack([row, row, out % block[0], valid])),
        column=on_device(topo, np.concatenate([*columns, [OUTSIDE]])),
        out=on_device(topo, np.column_stack([out, out + SUB])),
        source=None,
        part=block[1],
        high=SUB,
        cost=costs,
    )


def _cells(topo: Topology, block: tuple[int, int], transposed: bool) -> tuple[Any, ...]:
    """What a stack holds of the blocks: at most 64 output features by at most 64 contracted ones, a cell.

    Returns:
        Stack, place in the stack, column and offset in the values `(Z, bi, bo)` of every cell, sorted by stack and
        column, and how many output and contracted features there are.
    """
    out_side, in_side = block[::-1] if transposed else block
    high, part = min(out_side, SUB), min(in_side, SUB)
    block_row, block_col = topo.row.cpu().numpy(), topo.col.cpu().numpy()
    if transposed:
        block_row, block_col = block_col, block_row
    down, across = np.arange(out_side // high)[None, :, None], np.arange(in_side // part)[None, None, :]
    row = block_row[:, None, None] * (out_side // high) + down + 0 * across
    column = block_col[:, None, None] * (in_side // part) + across + 0 * down
    # Output features are contiguous in the forward product, contracted ones in the other.
    o_stride, k_stride = (block[0], 1) if transposed else (1, block[0])
    offset = down * high * o_stride + across * part * k_stride
    source = np.arange(len(block_row), dtype=np.int64)[:, None, None] * (block[0] * block[1]) + offset
    row, column, source = row.ravel(), column.ravel(), source.ravel()
    stack, place = row // (SUB // high), row % (SUB // high)
    order = np.lexsort((column, stack))
    grid = (topo.crow.numel() - 1) * block[0], (topo.t_crow.numel() - 1) * block[1]
    return stack[order], place[order], column[order], source[order], *(grid[::-1] if transposed else grid)


def _stacks(topo: Topology, block: tuple[int, int], transposed: bool) -> Stacks:
    stack, place, column, source, outputs, contracted = _cells(topo, block, transposed)
    out_side, in_side = block[::-1] if transposed else block
    high, part = min(out_side, SUB), min(in_side, SUB)
    per_stack, per_step = SUB // high, SUB // part
    count, columns = -(-outputs // SUB), contracted // part
    bounds = np.searchsorted(stack, np.arange(count + 1))
    cells = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    unions = [np.unique(column[own]) for own in cells]

    parts: list[np.ndarray] = []  # columns of all steps
    pieces: list[np.ndarray] = []  # sources of all panels' pieces
    bound, panel, out = [], [], []
    steps_so_far = pieces_so_far = 0
    for i, j in pairs_by_overlap(unions, columns):
        none = unions[i][:0]
        theirs = none if j is None else unions[j]
        runs = [
            np.intersect1d(unions[i], theirs, assume_unique=True),
            np.setdiff1d(unions[i], theirs, assume_unique=True),
            np.setdiff1d(theirs, unions[i], assume_unique=True),
        ]
        padded = [_padded(run, per_step) for run in runs]
        lengths = np.array([len(run) for run in padded]) // per_step
        bound.append([steps_so_far, *(steps_so_far + lengths.cumsum())])
        steps_so_far += int(lengths.sum())
        parts += padded
        begins = []
        for which, own_runs in ((i, (padded[0], padded[1])), (j, (padded[0], padded[2]))):
            begins.append(pieces_so_far * part)
            if which is None:
                continue
            layout = np.concatenate(own_runs)
            sources = np.full((len(layout), per_stack), -1, dtype=np.int64)
            at = np.full(columns + 1, -1)
            at[np.where(layout < 0, columns, layout)] = np.arange(len(layout))
            own = cells[which]
            sources[at[column[own]], place[own]] = source[own]
            pieces.append(sources)
            pieces_so_far += len(layout)
        panel.append([*begins, 0, per_step])
        out.append([i * SUB, -1 if j is None else j * SUB])
    every = np.concatenate([*parts, np.full(1, -1)])
    table = np.concatenate([*pieces, np.full((per_step, per_stack), -1, dtype=np.int64)])
    return Stacks(
        bound=on_device(topo, np.array(bound)),
        panel=on_device(topo, np.array(panel)),
        column=on_device(topo, np.where(every < 0, OUTSIDE, every * part)),
        out=on_device(topo, np.array(out)),
        source=torch.from_numpy(table).to(topo.col.device),
        part=part,
        high=high,
        cost=np.array([end - begin for begin, _, _, end in bound]),
    )


def _padded(run: np.ndarray, multiple: int) -> np.ndarray:
    """The run, and `-1` up to a multiple."""
    return np.concatenate([run, np.full(-len(run) % multiple, -1)])


class NarrowUnits(NamedTuple):
    """Work of the weight gradient where a side of the block is 16 or 32.

    Attributes:
        table: `(U, 2 + 2 * 128 / part)` int32: the 64 output features of two consumers, and the first input feature
            of each part that they sum.
        cells: `(U, 2, 64 / high, 128 / part)` int64: where the sums of `high` output by `part` input features go in
            the values, `-1` for nowhere.
        shared: Whether both consumers read the same input features.
        part: Input features of a part, 16 to 64.
        high: Output features of a block in a stack, 16 to 64.
    """

    table: Tensor
    cells: Tensor
    shared: bool
    part: int
    high: int


def narrow_units(topo: Topology, block: tuple[int, int]) -> NarrowUnits:
    """Work of `dy^T x` at stored blocks where a side of the block is 16 or 32."""
    return cached(topo, ("narrow units", block), lambda: _narrow_units(topo, block))


def _narrow_units(topo: Topology, block: tuple[int, int]) -> NarrowUnits:
    high, part = min(block[0], SUB), min(block[1], SUB)
    per_stack, columns_each = SUB // high, 2 * SUB // part
    shared = block[0] >= 2 * SUB
    stack, place, column, source, _, _ = _cells(topo, block, False)
    count = int(stack[-1]) + 1 if len(stack) else 0
    bounds = np.searchsorted(stack, np.arange(count + 1))
    slots: list[list[tuple[int, np.ndarray, np.ndarray]]] = []
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        union, at = np.unique(column[begin:end], return_inverse=True)
        union = _padded(union, columns_each)
        cells = np.full((per_stack, len(union)), -1, dtype=np.int64)
        cells[place[begin:end], at] = source[begin:end]
        slots.append(
            [
                (i * SUB, union[c : c + columns_each], cells[:, c : c + columns_each])
                for c in range(0, len(union), columns_each)
            ]
        )
    if shared:
        pairs = [pair for i in range(0, count, 2) for pair in zip(slots[i], slots[i + 1], strict=True)]
    else:
        flat = [slot for own in slots for slot in own]
        if len(flat) % 2:
            flat.append((flat[-1][0], np.full(columns_each, -1), np.full((per_stack, columns_each), -1)))
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
    feature = [np.concatenate([a[1], b[1]]) for a, b in pairs]
    table = [
        [a[0], b[0], *np.where(own < 0, OUTSIDE, own * part)]
        for (a, b), own in zip(pairs, feature, strict=True)
    ]
    places = np.array([[a[2], b[2]] for a, b in pairs], dtype=np.int64)
    return NarrowUnits(
        on_device(topo, np.array(table).reshape(len(pairs), 2 + 2 * columns_each)),
        torch.from_numpy(places.reshape(len(pairs), 2, per_stack, columns_each)).to(topo.col.device),
        shared,
        part,
        high,
    )
