"""Slots in the order of their experts, each expert's padded to whole tiles: for kernels that work on whole tiles.

The copy engine of a Hopper GPU reads rows that lie one after the other, and cannot leave rows out when it writes. So
slots are copied into a matrix in which every expert begins with a new tile, and results are copied back, through what
follows the product. Which tile is whose, and which program works on it, is found on the GPU: nothing waits.

    S slots, T tokens of TOP slots each, E experts, G row pairs of an expert's matrix, P programs, TOKENS slots a tile
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.grouped.reference import Groups
from sparsify.kernels.launch import launch
from sparsify.kernels.triton_common import activate, cdiv, next_power_of_2, unit_columns

# Tiles of slots that are worked on together: their activations stay in the L2 cache.
BAND = 8
CHUNK = 64
WIDEST = 1024


class Padding(NamedTuple):
    """Where slots go, and who works on them; int32.

    Attributes:
        place: `(S,)` row of each slot in the padded matrix, `-1` for slots without an expert.
        bins: `(P + 1,)` first item of each program.
        items: Row pair of all experts + (tile << 16), as many as `bins` ends with.
        rows: Rows of the padded matrix in the worst case.
    """

    place: Tensor
    bins: Tensor
    items: Tensor
    rows: int


@triton.jit
def _pad_kernel(
    place_ptr, bins_ptr, items_ptr,  # [S], [P + 1], [tiles in the worst case times G]
    order_ptr, offsets_ptr,  # [S], [E + 1]
    S, E, G, P,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    begins = tl.load(offsets_ptr + lane, mask=lane < E, other=0)
    ends = tl.load(offsets_ptr + lane + 1, mask=lane < E, other=0)
    tiles = (ends - begins + TOKENS - 1) // TOKENS
    through = tl.cumsum(tiles, 0)
    number = tl.program_id(0) * CHUNK + tl.arange(
        0, CHUNK
    )  # a program, an item, and a position among the slots
    # Items are dealt in turns: program p has the items p, p + P, p + 2 P and so on of the bands below.
    count = tl.sum(tiles, 0)
    total = count * G
    base = total // P
    extra = total % P
    tl.store(bins_ptr + number, number * base + tl.minimum(number, extra), mask=number <= P)
    long = extra * (base + 1)
    program = tl.where(number < long, number // (base + 1), extra + (number - long) // tl.maximum(base, 1))
    item = (number - program * base - tl.minimum(program, extra)) * P + program
    band = item // (BAND * G)
    high = tl.maximum(tl.minimum(count - band * BAND, BAND), 1)
    within = item - band * BAND * G
    tile = band * BAND + within % high
    expert = tl.sum((through[None, :] <= tile[:, None]).to(tl.int32), 1)
    tl.store(items_ptr + number, expert * G + within // high + (tile << 16), mask=number < total)
    after = (ends[None, :] <= number[:, None]) & (lane < E)[None, :]
    owner = tl.sum(after.to(tl.int32), 1)
    shift = (through - tiles) * TOKENS - begins
    row = number + tl.sum(tl.where(lane[None, :] == owner[:, None], shift[None, :], 0), 1)
    slot = tl.load(order_ptr + number, mask=number < S, other=0)
    tl.store(place_ptr + slot, tl.where(owner < E, row, -1), mask=number < S)


@triton.jit
def _gather_kernel(
    padded_ptr,  # [rows, K]
    x_ptr, place_ptr,  # [T, K], [S]
    K, TOP, stride_xt,
    WIDTH: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(place_ptr + slot).to(tl.int64)
    x = tl.load(x_ptr + (slot // TOP).to(tl.int64) * stride_xt + k, mask=k < K, other=0.0)
    tl.store(padded_ptr + row * K + k, x, mask=k < tl.where(row >= 0, K, 0))


@triton.jit
def _scatter_kernel(
    y_ptr,  # [S, W]
    padded_ptr, place_ptr, scale_ptr,  # [rows, W], or [rows, 2 W]; [S], [S]
    W,
    ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(place_ptr + slot).to(tl.int64)
    inside = n < tl.where(row >= 0, W, 0)
    at = padded_ptr + row * (2 * W if GATED else W) + n
    y = activate(tl.load(at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(at + W, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y *= tl.load(scale_ptr + slot).to(tl.float32)
    y = tl.where(row >= 0, y, 0.0)
    tl.store(y_ptr + slot.to(tl.int64) * W + n, y.to(y_ptr.dtype.element_ty), mask=n < W)


def pad(groups: Groups, tile: int, pairs: int, programs: int) -> Padding:
    """Finds a row for each slot, and deals tiles of `tile` slots by `pairs` row pairs to `programs` programs."""
    order, offsets = groups
    slots, count = order.numel(), groups.count
    tiles = min(slots, cdiv(slots, tile) + count)
    place, bins, items = (order.new_empty(size) for size in (slots, programs + 1, tiles * pairs))
    launch(
        _pad_kernel, (cdiv(max(slots, programs + 1, tiles * pairs), CHUNK), 1, 1),
        (place, bins, items, order, offsets, slots, count, pairs, programs),
        (tile, CHUNK, next_power_of_2(count + 1), BAND),
        order.device,
        num_warps=4,
    )  # fmt: skip
    return Padding(place, bins, items, tiles * tile)


def gather(x: Tensor, padding: Padding) -> Tensor:
    """`(rows, K)`: the activations `(T, K)` of each slot in its row; the other rows are left as they are."""
    x = unit_columns(x)
    slots, (tokens, features) = padding.place.numel(), x.shape
    padded, width = x.new_empty(padding.rows, features), min(WIDEST, next_power_of_2(features))
    launch(
        _gather_kernel, (slots, cdiv(features, width), 1),
        (padded, x, padding.place, features, slots // tokens, x.stride(0)),
        (width,),
        x.device,
        num_warps=4,
    )  # fmt: skip
    return padded


def scatter(
    padded: Tensor, padding: Padding, activation: str = "", scale: Tensor | None = None, gated: bool = False
) -> Tensor:
    """`(S, W)`: the results of each slot and what follows them, see `reference.grouped`.

    Args:
        padded: `(rows, W)`, `(rows, 2 W)` if `gated`.
        padding: Where slots are.
        activation: One of `linear.reference.ACTIVATIONS`.
        scale: `(S,)` or `None`.
        gated: Whether the activation of the first half is multiplied by the second half.
    """
    slots, features = padding.place.numel(), padded.shape[1] // (2 if gated else 1)
    y, width = padded.new_empty(slots, features), min(WIDEST, next_power_of_2(features))
    launch(
        _scatter_kernel, (slots, cdiv(features, width), 1),
        (y, padded, padding.place, scale, features),
        (activation, scale is not None, gated, width),
        padded.device,
        num_warps=4,
    )  # fmt: skip
    return y
