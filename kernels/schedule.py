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
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sparsify.kernels.lasting import lasting
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


_cache: dict[Hashable, tuple[list[StorageWeakRef], Any]] = {}


def cached(topos: Topology | Sequence[Topology], key: Hashable, build: Callable[[], T]) -> T:
    """What `build` returns for these index tensors, made at most once while they live and do not change."""
    cols = [topos.col] if isinstance(topos, Topology) else [topo.col for topo in topos]
    storages = [col.untyped_storage() for col in cols]
    identity = (
        *(
            (s._cdata, col.storage_offset(), col.numel(), col._version)
            for s, col in zip(storages, cols, strict=True)
        ),
        key,
    )
    hit = _cache.get(identity)
    if hit is None or any(ref.expired() for ref in hit[0]):
        for stale in [k for k, (refs, _) in _cache.items() if any(ref.expired() for ref in refs)]:
            del _cache[stale]
        made = lasting(cols[0].device, build)
        hit = _cache[identity] = ([StorageWeakRef(storage) for storage in storages], made)
    return hit[1]


MOST_PLANS = 256
_plans: dict[int, tuple[weakref.ref[Tensor], int, dict[Hashable, Any]]] = {}


def plans(topo: Topology) -> dict[Hashable, Any]:
    """Whatever callers want to keep with these very index tensors while they live and do not change."""
    col = topo.col
    held = _plans.get(id(col))
    if held is None or held[0]() is not col or held[1] != col._version:
        for stale in [key for key, (ref, _, _) in _plans.items() if ref() is None]:
            del _plans[stale]
        held = _plans[id(col)] = weakref.ref(col), col._version, {}
    if len(held[2]) > MOST_PLANS:  # one for each number of tokens that came along
        held[2].clear()
    return held[2]


_versions: dict[int, tuple[StorageWeakRef, int]] = {}


def unchanged(values: Tensor) -> bool:
    """Whether these weights have not been written since the last call with them, so that no kernel may be at it."""
    storage = values.untyped_storage()
    if values.is_inference():
        return False  # has no version
    seen = _versions.get(storage._cdata)
    if seen is not None and seen[1] == values._version and not seen[0].expired():
        return True
    for stale in [key for key, (ref, _) in _versions.items() if ref.expired()]:
        del _versions[stale]
    _versions[storage._cdata] = StorageWeakRef(storage), values._version
    return False


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


# Columns this far out are read as zeros by the copy engine, for any weight that fits 32-bit block indices.
OUTSIDE = 1 << 24


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
        bound=_on(topo, np.column_stack([ends - costs, ends, ends, ends])),
        panel=_on(topo, np.column_stack([row, row, out % block[0], valid])),
        column=_on(topo, np.concatenate([*columns, [OUTSIDE]])),
        out=_on(topo, np.column_stack([out, out + SUB])),
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
    for i, j in _pairs_by_overlap(unions, columns):
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
        bound=_on(topo, np.array(bound)),
        panel=_on(topo, np.array(panel)),
        column=_on(topo, np.where(every < 0, OUTSIDE, every * part)),
        out=_on(topo, np.array(out)),
        source=torch.from_numpy(table).to(topo.col.device),
        part=part,
        high=high,
        cost=np.array([end - begin for begin, _, _, end in bound]),
    )


def _padded(run: np.ndarray, multiple: int) -> np.ndarray:
    """The run, and `-1` up to a multiple."""
    return np.concatenate([run, np.full(-len(run) % multiple, -1)])


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


class DecodeWork(NamedTuple):
    """Work of decoding: each program multiplies some units of one group of output features.

    A unit is 64 packed columns by `height` output features, 64 or 128. A group whose units are shared by several
    programs has their numbers in a row.

    Attributes:
        programs: `(P, 7)` int32 on the GPU: group, units, how many of these are the first weight's (of a pair), the
            group's programs, the first of them, and how many parts of the last unit of the first and of the second
            weight are theirs, where what follows in the values is another row's.
        units: `(P * most + most, 1 + 64 / bi)` int32 on the GPU, `most` for each program: a unit's first row in the
            values `(Z * bi, bo)` and the first input feature of each of its parts.
        most: Most units of a program.
        groups: Groups of output features.
        divided: Whether any group has several programs.
        unused: `(1,)` float32, in place of partial sums where there are none.
    """

    programs: Tensor
    units: Tensor
    most: int
    groups: int
    divided: bool
    unused: Tensor


def decode_work(
    topos: Sequence[Topology], block: tuple[int, int], height: int, programs: int, least: int, parts: int
) -> DecodeWork:
    """Work of `x W^T` for few tokens, and of a gate and an up projection in one launch if `topos` are two.

    Args:
        topos: Indices of one or two weights of one shape, in blocks of one shape.
        block: `(bo, bi)`, `bo` a multiple of `height`.
        height: Output features of a group.
        programs: Programs that run at a time; about half as many at least get a share.
        least: Units below which no group is divided.
        parts: Most programs of a group.
    """
    key = ("decode", block, height, programs, least, parts)
    return cached(topos, key, lambda: _decode_work(topos, block, height, programs, least, parts))


def _decode_work(
    topos: Sequence[Topology], block: tuple[int, int], height: int, programs: int, least: int, parts: int
) -> DecodeWork:
    packed = [_packed_units(topo, block) for topo in topos]
    halves = block[0] // height
    rows, columns, group = (np.concatenate([part[i] for part in packed]) for i in range(3))
    valid = (columns != OUTSIDE).sum(1)
    which = np.repeat(np.arange(len(packed)), [len(part[0]) for part in packed])
    order = np.lexsort((np.arange(len(group)), which, group))
    units, which, group = np.column_stack([rows, columns])[order], which[order], group[order]
    valid = valid[order].tolist()
    block_rows = topos[0].crow.numel() - 1
    begins, ends = (np.searchsorted(group, np.arange(block_rows), side) for side in ("left", "right"))
    share = max(least, -(-2 * len(group) * halves // programs))
    headers, places = [], []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        # A little more than a share stays whole: adding up costs more than the others' wait.
        count = min(parts, max(1, int((end - begin) / share + 0.3)))
        bounds = begin + np.arange(count + 1) * (end - begin) // count
        firsts = np.searchsorted(which[begin:end], 1) + begin
        for half in range(halves):
            base = len(headers)
            for at, until in itertools.pairwise(bounds.tolist()):
                own = min(max(int(firsts) - at, 0), until - at)
                ends_of = valid[at + own - 1] if own else 0, valid[until - 1]
                headers.append([group[begin] * halves + half, until - at, own, count, base, *ends_of])
                places.append((at, until))
    most = max(until - at for at, until in places)
    table = np.zeros((len(headers) * most + most, units.shape[1]), dtype=np.int64)
    for i, (at, until) in enumerate(places):
        table[i * most : i * most + until - at] = units[at:until]
    first = topos[0]
    divided = any(header[3] > 1 for header in headers)
    return DecodeWork(
        programs=_on(first, np.array(headers)),
        units=_on(first, table),
        most=most,
        groups=block_rows * halves,
        divided=divided,
        unused=torch.zeros(1, device=first.col.device),
    )


def _packed_units(topo: Topology, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row in the values, first input feature of each part, and block row of every 64 packed columns.

    An empty row has one unit that lies outside, so that somebody writes its output.
    """
    wide = block[1]
    crow, col = topo.crow.cpu().numpy().astype(np.int64), topo.col.cpu().numpy().astype(np.int64)
    if wide >= SUB:  # each block is several units
        subs = wide // SUB
        rows = np.arange(len(col) * subs) * SUB
        columns = (np.repeat(col, subs) * wide + np.tile(np.arange(subs) * SUB, len(col)))[:, None]
        group = np.repeat(topo.row.cpu().numpy(), subs)
    else:  # a unit is several blocks of one row; the last one of a row may lack some
        parts = SUB // wide
        units = -(-np.diff(crow) // parts)
        group = np.repeat(np.arange(len(units)), units)
        number = np.arange(len(group)) - np.repeat(np.append(0, units.cumsum())[:-1], units)
        block_at = crow[:-1][group] + number * parts
        rows = block_at * wide
        at = block_at[:, None] + np.arange(parts)
        inside = at < crow[1:][group][:, None]
        columns = (
            np.where(inside, col[np.minimum(at, max(len(col) - 1, 0))] * wide, OUTSIDE) if len(col) else at
        )
    empty = np.flatnonzero(np.diff(crow) == 0)
    outside = np.full((len(empty), columns.shape[1]), OUTSIDE)
    beyond = np.full(len(empty), len(col) * wide)
    return (
        np.concatenate([rows, beyond]),
        np.concatenate([columns, outside]),
        np.concatenate([group, empty]),
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
    return Units(_on(topo, np.array(table, dtype=np.int64).reshape(-1, 10)), shared)


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
        _on(topo, np.array(table).reshape(len(pairs), 2 + 2 * columns_each)),
        torch.from_numpy(places.reshape(len(pairs), 2, per_stack, columns_each)).to(topo.col.device),
        shared,
        part,
        high,
    )


def _on(topo: Topology, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(topo.col.device)
