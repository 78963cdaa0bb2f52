"""Products with the block-sparse matrices of all experts in one launch each: see `reference`.

A program finds its tile of slots itself, from where each expert's slots begin, so that nothing waits for the router's
counts and the launch can be recorded: the grid is that of the worst case, and programs beyond the last tile return.
Tiles do not cross from one expert to the next, and experts without slots have none. Activations are gathered, and
results put back, in the tokens' own order: nothing is copied into sorted order before or after.

    grouped     one program: a tile of BM slots by BN of a block row's features; of a gated product BN of either half
    grouped_dx  one program: a tile of BM slots by one block column
    grouped_dw  one program: a tile of one stored block, summed over all slots of its expert

    T tokens, S slots of which each token has TOP, E experts, R x C blocks of one expert, Z stored blocks of (BI, BO),
    LANES a power of two above E
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.grouped import reference as grouped_reference
from sparsify.kernels.grouped.reference import Groups, slots_per_token
from sparsify.kernels.launch import launch
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import (
    activate,
    cdiv,
    dot,
    dot_options,
    next_power_of_2,
    token_tile,
    unit_columns,
)

# Slots that one kernel sorts, by comparing all with all; a radix sort takes more.
FEW_SLOTS = 1024
# Tiles of slots that are worked on together: their activations stay in the L2 cache while each block row's weights are
# read once for all of them.
BAND = 8
# Programs that fill a large GPU.
PROGRAMS = 512
TILE = 128


@triton.jit
def _group_kernel(
    order_ptr, offsets_ptr,  # [S], [E + 1]
    experts_ptr,  # [S]
    S, E,
    SLOTS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    other = tl.arange(0, SLOTS)
    place = tl.program_id(0) * BM + tl.arange(0, BM)  # a slot, and an expert
    others = tl.load(experts_ptr + other, mask=other < S, other=E).to(tl.int32)
    others = tl.where(other < S, tl.minimum(others, E), E + 1)
    own = tl.minimum(tl.load(experts_ptr + place, mask=place < S, other=E).to(tl.int32), E)
    earlier = (others[None, :] == own[:, None]) & (other[None, :] < place[:, None])
    rank = tl.sum(((others[None, :] < own[:, None]) | earlier).to(tl.int32), 1)
    tl.store(order_ptr + rank, place, mask=place < S)
    before = tl.sum((others[None, :] < place[:, None]).to(tl.int32), 1)
    tl.store(offsets_ptr + place, before, mask=place <= E)


@triton.jit
def _find_tile(offsets_ptr, tile, S, E, BM: tl.constexpr, LANES: tl.constexpr):
    """Expert, first slot and end of a tile; `E` for slots without an expert. Beyond the last tile: none is inside."""
    lane = tl.arange(0, LANES)
    begins = tl.load(offsets_ptr + lane, mask=lane <= E, other=0)
    ends = tl.load(offsets_ptr + lane + 1, mask=lane < E, other=0)
    ends = tl.where(lane == E, S, ends)
    tiles = (ends - begins + BM - 1) // BM
    through = tl.cumsum(tiles, 0)
    expert = tl.sum((through <= tile).to(tl.int32), 0)
    own = lane == expert
    begin = tl.sum(tl.where(own, begins + (tile - through + tiles) * BM, 0), 0)
    end = tl.sum(tl.where(own, ends, 0), 0)
    return expert, begin, end


@triton.jit
def _place(program, tiles, width, BAND: tl.constexpr):
    """Tile of slots and part of the features of a program: `BAND` tiles have all their parts before the next ones."""
    band = program // (BAND * width)
    high = tl.minimum(tiles - band * BAND, BAND)
    within = program - band * BAND * width
    return band * BAND + within % high, within // high


@triton.jit
def _panel(
    acc, x_ptr, values_ptr, crow_ptr, col_ptr, x_offset, inside_m, row, some, first, K,
    BI: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds the products of one block row, from feature `first` of its blocks on, to `acc` `[BM, BN]`."""
    lane = tl.arange(0, BK)
    begin = tl.load(crow_ptr + row)
    packed = tl.where(some, (tl.load(crow_ptr + row + 1) - begin) * BI, 0)
    panel_ptr = values_ptr + begin.to(tl.int64) * (BI * BO) + first
    w_offset = lane[:, None] * BO + tl.arange(0, BN)[None, :]
    if acc.shape[0] == 1:  # one slot: multiply and add by element, and sum over the columns once at the end
        wide = tl.zeros((BK, BN), dtype=tl.float32)
    for start in range(0, packed, BK):
        step = start + lane  # [BK] position in the row's packed columns
        inside = step < packed
        # An index for each lane, for the pipeline's sake: see triton_dsd.
        k = tl.load(col_ptr + begin + step // BI, mask=inside, other=0) * BI + step % BI
        x_mask = inside_m[:, None] & (inside & (k < K))[None, :]
        x = tl.load(x_ptr + x_offset[:, None] + k[None, :], mask=x_mask, other=0.0)  # [BM, BK]
        w = tl.load(panel_ptr + start * BO + w_offset, mask=inside[:, None], other=0.0)  # [BK, BN]
        if acc.shape[0] == 1:
            wide += tl.trans(x).to(tl.float32) * w.to(tl.float32)
        else:
            acc = dot(x, w, acc, PRECISION, WIDEN)
    if acc.shape[0] == 1:
        acc += tl.sum(wide, 0)[None, :]
    return acc


@triton.jit
def _bias(bias_ptr, expert, n, N):
    return tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _grouped_kernel(
    y_ptr,  # [S, N], or [S, N / 2]
    x_ptr, values_ptr, bias_ptr, scale_ptr, crow_ptr, col_ptr,  # [T, K], [Z, BI, BO], [E, N], [S], [E R + 1], [Z]
    order_ptr, offsets_ptr,  # [S], [E + 1]
    S, N, K, R, E, tiles, TOP, stride_xt,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, GATED: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    LANES: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BO // BN
    rows = R // 2 if GATED else R
    tile, part = _place(tl.program_id(0), tiles, rows * PARTS, BAND)
    expert, begin, end = _find_tile(offsets_ptr, tile, S, E, BM, LANES)
    if begin >= end:
        return
    place = begin + tl.arange(0, BM)
    inside_m = place < end
    slot = tl.load(order_ptr + place, mask=inside_m, other=0)
    x_offset = (slot // TOP).to(tl.int64) * stride_xt
    some = expert < E
    row = part // PARTS
    first = part % PARTS * BN
    own = tl.minimum(expert, E - 1)
    at = own * R + row
    n = row * BO + first + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc = _panel(
        acc, x_ptr, values_ptr, crow_ptr, col_ptr, x_offset, inside_m, at, some, first, K,
        BI, BO, BN, BK, PRECISION, WIDEN,
    )  # fmt: skip
    if HAS_BIAS:
        acc += _bias(bias_ptr, own, n, N)
    acc = activate(acc, ACTIVATION)
    width = N
    if GATED:
        width = N // 2
        up = tl.zeros((BM, BN), dtype=tl.float32)
        up = _panel(
            up, x_ptr, values_ptr, crow_ptr, col_ptr, x_offset, inside_m, at + rows, some, first, K,
            BI, BO, BN, BK, PRECISION, WIDEN,
        )  # fmt: skip
        if HAS_BIAS:
            up += _bias(bias_ptr, own, n + width, N)
        acc *= up
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + slot, mask=inside_m, other=0.0).to(tl.float32)[:, None]
    out = y_ptr + slot.to(tl.int64)[:, None] * width + n[None, :]
    # A slot without an expert is zero whatever the activation of zero is.
    acc = tl.where(some, acc, 0.0)
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & (n < width)[None, :])


@triton.jit
def _dx_kernel(
    dx_ptr,  # [S, K]
    dy_ptr, values_ptr,  # [S, N], [Z, BI, BO]
    crow_ptr, t_crow_ptr, t_row_ptr, t_block_ptr,  # [E R + 1], [E (C + 1)], [Z], [Z]
    order_ptr, offsets_ptr,  # [S], [E + 1]
    S, N, K, R, C, E, tiles, stride_ys,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    LANES: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tile, col = _place(tl.program_id(0), tiles, C, BAND)
    expert, place, end = _find_tile(offsets_ptr, tile, S, E, BM, LANES)
    if place >= end:
        return
    places = place + tl.arange(0, BM)
    inside_m = places < end
    slot = tl.load(order_ptr + places, mask=inside_m, other=0).to(tl.int64)
    own = tl.minimum(expert, E - 1)
    base = tl.load(crow_ptr + own * R)  # the expert's first block
    begin = tl.load(t_crow_ptr + own * (C + 1) + col)
    packed = (tl.load(t_crow_ptr + own * (C + 1) + col + 1) - begin) * BO
    packed = tl.where(expert < E, packed, 0)
    begin += base
    i = tl.arange(0, BI)
    lane = tl.arange(0, BK)
    w_offset = i[None, :] * BO
    acc = tl.zeros((BM, BI), dtype=tl.float32)
    for start in range(0, packed, BK):
        step = start + lane  # [BK] position in the column's packed output features
        inside = step < packed
        n = tl.load(t_row_ptr + begin + step // BO, mask=inside, other=0) * BO + step % BO
        block = tl.load(t_block_ptr + begin + step // BO, mask=inside, other=0).to(tl.int64) + base
        dy_mask = inside_m[:, None] & (inside & (n < N))[None, :]
        dy = tl.load(dy_ptr + slot[:, None] * stride_ys + n[None, :], mask=dy_mask, other=0.0)  # [BM, BK]
        w_rows = (block * (BI * BO) + step % BO)[:, None]
        w = tl.load(values_ptr + w_rows + w_offset, mask=inside[:, None], other=0.0)  # [BK, BI]
        acc = dot(dy, w, acc, PRECISION, WIDEN)
    k = col * BI + i
    out = dx_ptr + slot[:, None] * K + k[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=inside_m[:, None] & (k < K)[None, :])


@triton.jit
def _dw_kernel(
    dw_ptr,  # [Z, BI, BO]
    dy_ptr, x_ptr, crow_ptr, row_ptr, col_ptr,  # [S, N], [T, K], [E R + 1], [Z], [Z]
    order_ptr, offsets_ptr,  # [S], [E + 1]
    N, K, R, E, TOP, stride_ys, stride_xt,
    BI: tl.constexpr, BO: tl.constexpr, TI: tl.constexpr, TO: tl.constexpr, BM: tl.constexpr,
    LANES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tile = tl.program_id(1)
    lane = tl.arange(0, LANES)
    starts = tl.load(crow_ptr + lane * R, mask=lane < E, other=0)
    # The last expert that begins at or before this block: those without blocks begin where the next one does.
    expert = tl.sum(((starts <= block) & (lane < E)).to(tl.int32), 0) - 1
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    i = tile // (BO // TO) * TI + tl.arange(0, TI)
    o = tile % (BO // TO) * TO + tl.arange(0, TO)
    k = tl.load(col_ptr + block) * BI + i
    n = tl.load(row_ptr + block) * BO + o
    acc = tl.zeros((TI, TO), dtype=tl.float32)
    for start in range(begin, end, BM):
        place = start + tl.arange(0, BM)
        inside = place < end
        slot = tl.load(order_ptr + place, mask=inside, other=0)
        x_ptrs = x_ptr + (slot // TOP).to(tl.int64)[None, :] * stride_xt + k[:, None]
        x = tl.load(x_ptrs, mask=inside[None, :] & (k < K)[:, None], other=0.0)  # [TI, BM]
        dy_ptrs = dy_ptr + slot.to(tl.int64)[:, None] * stride_ys + n[None, :]
        dy = tl.load(dy_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)  # [BM, TO]
        acc = dot(x, dy, acc, PRECISION, WIDEN)
    out = dw_ptr + block.to(tl.int64) * (BI * BO) + i[:, None] * BO + o[None, :]
    tl.store(out, acc.to(dw_ptr.dtype.element_ty))


def group(experts: Tensor, count: int) -> Groups:
    """Slots by expert; see `reference.group`."""
    slots = experts.shape[0]
    if not 0 < slots <= FEW_SLOTS:
        return grouped_reference.group(experts, count)
    order, offsets = (experts.new_empty(size, dtype=torch.int32) for size in (slots, count + 1))
    launch(
        _group_kernel, (cdiv(max(slots, count + 1), 16), 1, 1),
        (order, offsets, experts.contiguous(), slots, count),
        (next_power_of_2(slots), 16),
        experts.device,
        num_warps=4,
    )  # fmt: skip
    return Groups(order, offsets)


def _most_tiles(slots: int, count: int, tile: int) -> int:
    """Tiles of slots in the worst case: each expert, and those without one, may have one that is not full."""
    return min(slots, cdiv(slots, tile) + count)


def _tile(slots: int, count: int) -> int:
    """Slots a tile: about as many as an expert has."""
    return 1 if 4 * slots <= count else token_tile(cdiv(slots, count))


def _stages(dtype: torch.dtype, elements: int) -> int:
    """Pipeline stages for a result of so many elements a program: twice as many as there are buffers, since an index is
    read before what it points to."""
    return 2 if dtype == torch.float32 else 5 if elements < 128 * 128 else 4


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
    *,
    tile: int | None = None,
    part: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """The forward product and what follows it; see `reference.grouped` for shapes.

    If `gated`, `out_features` is a multiple of `2 bo`. `tile` slots and `part` of a block row's features a program,
    `step` packed columns at a time, `warps` and pipeline `stages` are chosen by size where they are left out.
    """
    order, offsets = groups
    slots, (tokens, in_features) = order.numel(), x.shape
    _, block_in, block_out = values.shape
    y = x.new_empty(slots, out_features // 2 if gated else out_features)
    if slots == 0:
        return y
    count, x = groups.count, unit_columns(x)
    rows, tile = (topo.crow.numel() - 1) // count, tile or _tile(slots, count)
    tiles, programs = _most_tiles(slots, count, tile), rows // 2 if gated else rows
    few = tile <= 16
    if part is None:  # of few slots, panels are cut lengthwise until there are enough programs to read them
        part = min(block_out, 128)
        while few and part > 16 and tiles * programs * (block_out // part) < PROGRAMS:
            part //= 2
    sums = tile * part * (2 if gated else 1)
    # Few slots: 16 KB of weights at a time.
    step = step or (
        max(64, min(8192 // part, 512 if tile == 1 else 256)) if few else max(32, min(block_in, 64))
    )
    launch(
        _grouped_kernel, (tiles * programs * (block_out // part), 1, 1),
        (
            y,
            x, values, bias, scale, topo.crow, topo.col,
            order, offsets,
            slots, out_features, in_features, rows, count, tiles, slots_per_token(slots, tokens), x.stride(0),
        ),
        (
            bias is not None, activation, scale is not None, gated,
            block_in, block_out, tile, part, step, next_power_of_2(count + 1), BAND, *dot_options(x.dtype),
        ),
        x.device,
        num_warps=warps or (8 if sums >= 128 * 128 else 4),
        num_stages=stages or _stages(x.dtype, tile * part),
        # Two programs a multiprocessor; without the limit the compiler takes a few registers more.
        **({"maxnreg": 128} if gated and sums == 128 * 128 and warps in (None, 8) else {}),
    )  # fmt: skip
    return y


def grouped_dx(
    dy: Tensor,
    values: Tensor,
    topo: Topology,
    groups: Groups,
    in_features: int,
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """The gradient of the input, slot by slot; see `reference.grouped_dx` for shapes, `grouped` for options."""
    order, offsets = groups
    slots, out_features = dy.shape
    _, block_in, block_out = values.shape
    dx = dy.new_empty(slots, in_features)
    if slots == 0:
        return dx
    count, dy = groups.count, unit_columns(dy)
    rows, cols = (topo.crow.numel() - 1) // count, topo.t_crow.numel() // count - 1
    tile = tile or token_tile(cdiv(slots, count))
    tiles = _most_tiles(slots, count, tile)
    launch(
        _dx_kernel, (tiles * cols, 1, 1),
        (
            dx,
            dy, values, topo.crow, topo.t_crow, topo.t_row, topo.t_block,
            order, offsets,
            slots, out_features, in_features, rows, cols, count, tiles, dy.stride(0),
        ),
        (
            block_in, block_out, tile, step or max(32, min(block_out, 64)), next_power_of_2(count + 1), BAND,
            *dot_options(dy.dtype),
        ),
        dy.device,
        num_warps=warps or (8 if tile * block_in >= 128 * 128 else 4),
        num_stages=stages or _stages(dy.dtype, tile * block_in),
    )  # fmt: skip
    return dx


def grouped_dw(
    dy: Tensor,
    x: Tensor,
    topo: Topology,
    groups: Groups,
    block_in: int,
    block_out: int,
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """The gradient of the weights at stored blocks; see `reference.grouped_dw` for shapes.

    The longest side `tile` of a program's part of a block, `step` slots at a time, `warps` and pipeline `stages` are
    chosen by size where they are left out.
    """
    order, offsets = groups
    blocks, slots = topo.col.numel(), order.numel()
    if blocks == 0 or slots == 0:
        return x.new_zeros(blocks, block_in, block_out)
    count, dy, x = groups.count, unit_columns(dy), unit_columns(x)
    tile_in, tile_out = min(block_in, tile or TILE), min(block_out, tile or TILE)
    dw = x.new_empty(blocks, block_in, block_out)
    launch(
        _dw_kernel, (blocks, (block_in // tile_in) * (block_out // tile_out), 1),
        (
            dw,
            dy, x, topo.crow, topo.row, topo.col,
            order, offsets,
            dy.shape[1], x.shape[1], (topo.crow.numel() - 1) // count, count, slots_per_token(slots, x.shape[0]),
            dy.stride(0), x.stride(0),
        ),
        (
            block_in, block_out, tile_in, tile_out, step or 32, next_power_of_2(count + 1),
            *dot_options(x.dtype),
        ),
        x.device,
        num_warps=warps or (8 if tile_in * tile_out >= 128 * 128 else 4),
        num_stages=stages or _stages(x.dtype, tile_in * tile_out),
    )  # fmt: skip
    return dw
