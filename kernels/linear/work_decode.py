"""Work lists for few tokens: every program streams some units of one group of output features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsify.kernels.schedule import OUTSIDE, SUB, cached, on_device
from sparsify.kernels.storage import Topology


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
        programs=on_device(first, np.array(headers)),
        units=on_device(first, table),
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
