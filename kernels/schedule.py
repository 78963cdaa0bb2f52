"""What the Hopper kernels' work lists share: how they are kept, on the GPU and in order.

The kernels work in tiles of 64 output features by 64 contracted features ("sub-blocks"), whatever the block shape is.
Two rows of sub-blocks share one program, and so the activations that it loads. Tiles (row pair x token tile) are dealt
to the multiprocessors by list scheduling, longest first within bands of token tiles that stay in the L2 cache.

    work_square   blocks whose sides are multiples of 64
    work_narrow   blocks with a side of 16 or 32
    work_decode   few tokens

Lists depend on the mask, and tiles on the number of token tiles too. Both are made once and kept for as long as the
index tensors live.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

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
# Columns this far out are read as zeros by the copy engine, for any weight that fits 32-bit block indices.
OUTSIDE = 1 << 24

T = TypeVar("T")

_cache: dict[Hashable, tuple[list[StorageWeakRef], Any]] = {}


def token(topo: Topology) -> Tensor:
    """The tensor that stands for a topology in caches: it is derived anew whenever the indices change.

    How often a tensor was written to would not tell: DistributedDataParallel copies the first process's buffers over
    everybody's before each step, and torch 2.11 counts that as a change.
    """
    return topo.t_block


def cached(topos: Topology | Sequence[Topology], key: Hashable, build: Callable[[], T]) -> T:
    """What `build` returns for these index tensors, made at most once while they live."""
    tokens = [token(topo) for topo in ([topos] if isinstance(topos, Topology) else topos)]
    storages = [own.untyped_storage() for own in tokens]
    identity = (
        *((s._cdata, own.storage_offset(), own.numel()) for s, own in zip(storages, tokens, strict=True)),
        key,
    )
    hit = _cache.get(identity)
    if hit is None or any(ref.expired() for ref in hit[0]):
        for stale in [k for k, (refs, _) in _cache.items() if any(ref.expired() for ref in refs)]:
            del _cache[stale]
        made = lasting(tokens[0].device, build)
        hit = _cache[identity] = ([StorageWeakRef(storage) for storage in storages], made)
    return hit[1]


MOST_PLANS = 256
_plans: dict[int, tuple[weakref.ref[Tensor], dict[Hashable, Any]]] = {}


def plans(topo: Topology) -> dict[Hashable, Any]:
    """Whatever callers want to keep with these very index tensors while they live."""
    own = token(topo)
    held = _plans.get(id(own))
    if held is None or held[0]() is not own:
        for stale in [key for key, (ref, _) in _plans.items() if ref() is None]:
            del _plans[stale]
        held = _plans[id(own)] = weakref.ref(own), {}
    if len(held[1]) > MOST_PLANS:  # one for each number of tokens that came along
        held[1].clear()
    return held[1]


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


def pairs_by_overlap(rows: list[np.ndarray], columns: int) -> list[tuple[int, int | None]]:
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
    return on_device(topo, bounds), on_device(topo, np.array([tile for own in dealt for tile in own]))


def on_device(topo: Topology, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(topo.col.device)
