"""`y = act(x W^T + bias)` and `dx = dy W` on Hopper GPUs for blocks with a side of 16 or 32.

The tensor cores take 64 output features at a time, so block rows less than 64 high are stacked: a stack multiplies the
union of their columns, with zeros where one of them has no block. Two stacks share a program, and so the activations
of the columns that both have. The weights of each stack are first copied into one panel, in the order in which they
are used; blocks at least 128 high are such panels already and are read in place. Activations of 64 contracted features
that lie apart are rows of a transposed copy of `x`. Both copies are made here and their time is part of the kernel's.

    M tokens, `TOKENS` a tile; a step is 64 packed contracted features, in parts of `PART`
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsify.kernels.hopper_common import (
    activate,
    descriptor,
    load_tile,
    make_ring,
    multiprocessors,
    store_transposed,
)
from sparsify.kernels.launch import launch
from sparsify.kernels.linear.work_narrow import Stacks, stacks
from sparsify.kernels.schedule import tiles
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import cdiv


@triton.jit
def _transpose_kernel(
    xt_ptr,  # [K, stride]
    x_ptr,  # [M, K]
    M, K, stride_xm, stride_xt,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * stride_xm + k[None, :], mask=inside, other=0.0)
    tl.store(xt_ptr + k.to(tl.int64)[:, None] * stride_xt + m[None, :], tl.trans(x), mask=tl.trans(inside))


def transposed(x: Tensor) -> Tensor:
    """`(K, M)` copy of `x` `(M, K)` whose rows are padded to what the copy engine can address."""
    tokens, features = x.shape
    xt = x.new_empty(features, cdiv(tokens, 8) * 8)[:, :tokens]
    grid = (cdiv(tokens, 64), cdiv(features, 64), 1)
    strides = (x.stride(0), xt.stride(0))
    launch(_transpose_kernel, grid, (xt, x, tokens, features, *strides), (64, 64), x.device, num_warps=4)
    return xt


@triton.jit
def _stack_kernel(
    panels_ptr,  # [P * PART, 64]
    values_ptr, source_ptr,  # flat, [P, 64 // HIGH] int64
    P, stride_part, stride_high,
    HIGH: tl.constexpr, PART: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * (PIECES * PART) + tl.arange(0, PIECES * PART)
    o = tl.arange(0, 64)
    piece = row // PART
    source = tl.load(
        source_ptr + piece[:, None] * (64 // HIGH) + (o // HIGH)[None, :], mask=(piece < P)[:, None], other=-1
    )
    offset = (row % PART)[:, None] * stride_part + (o % HIGH)[None, :] * stride_high
    w = tl.load(values_ptr + source + offset, mask=source >= 0, other=0.0)
    tl.store(panels_ptr + row.to(tl.int64)[:, None] * 64 + o[None, :], w, mask=(piece < P)[:, None])


def _panels(values: Tensor, work: Stacks, transpose: bool) -> Tensor:
    """The weights of all stacks, one below the other, `(pieces * part, 64)`."""
    pieces, part = work.source.shape[0], work.part
    panels = values.new_empty(pieces * part, 64)
    strides = (1, values.shape[2]) if transpose else (values.shape[2], 1)
    together = 64 // part
    launch(
        _stack_kernel, (cdiv(pieces, together), 1, 1),
        (panels, values, work.source, pieces, *strides), (work.high, part, together),
        values.device, num_warps=4,
    )  # fmt: skip
    return panels


@gluon.jit
def _produce(
    x_desc, w_desc,
    bins_ptr, tiles_ptr, bound_ptr, panel_ptr, column_ptr,
    xs, ws0, ws1, full, empty,
    COLUMN: gl.constexpr, TRANSPOSED: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 64 // PART
    program = gl.program_id(0)
    stage = 0
    phase = 1
    for i in range(gl.load(bins_ptr + program), gl.load(bins_ptr + program + 1)):
        tile = gl.load(tiles_ptr + i)
        group = tile & 0xFFFF
        token = (tile >> 16) * TOKENS
        begin = gl.load(bound_ptr + group * 4)
        both = gl.load(bound_ptr + group * 4 + 1)
        firsts = gl.load(bound_ptr + group * 4 + 2)
        end = gl.load(bound_ptr + group * 4 + 3)
        row0 = gl.load(panel_ptr + group * 4)
        row1 = gl.load(panel_ptr + group * 4 + 1)
        at = gl.load(panel_ptr + group * 4 + 2)
        for step in range(begin, end):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            has0 = step < firsts
            has1 = (step < both) | (step >= firsts)
            mbarrier.expect(bar, TOKENS * 128 + 16384, pred=step < both)
            mbarrier.expect(bar, TOKENS * 128 + 8192, pred=step >= both)
            for part in gl.static_range(PARTS):
                column = gl.load(column_ptr + step * PARTS + part)
                if TRANSPOSED:
                    load_tile(x_desc, [column, token], bar, xs.index(stage * PARTS + part))
                else:
                    load_tile(x_desc, [token, column], bar, xs.index(stage * PARTS + part))
            load_tile(w_desc, [row0, at], bar, ws0.index(stage), pred=has0)
            load_tile(w_desc, [row1, at + COLUMN], bar, ws1.index(stage), pred=has1)
            row0 += gl.where(has0, 64, 0)
            row1 += gl.where(has1, 64, 0)
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _multiply(ws, xs, acc, stage, part: gl.constexpr, TRANSPOSED: gl.constexpr, PART: gl.constexpr):
    """Starts `acc += weights @ tokens` for one part of a stage."""
    w = ws.index(stage).slice(part * PART, PART, dim=0).permute((1, 0))
    tokens = xs.index(stage * (64 // PART) + part)
    if not TRANSPOSED:
        tokens = tokens.permute((1, 0))
    return warpgroup_mma(w, tokens, acc, is_async=True)


@gluon.jit
def _consume(
    y_desc, bias_ptr,
    bins_ptr, tiles_ptr, bound_ptr, panel_ptr, out_ptr, N,
    xs, ws, full, empty, staging,
    WHICH: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    TRANSPOSED: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 64 // PART
    program = gl.program_id(0)
    stage = 0
    phase = 0
    for i in range(gl.load(bins_ptr + program), gl.load(bins_ptr + program + 1)):
        tile = gl.load(tiles_ptr + i)
        group = tile & 0xFFFF
        token = (tile >> 16) * TOKENS
        begin = gl.load(bound_ptr + group * 4)
        both = gl.load(bound_ptr + group * 4 + 1)
        firsts = gl.load(bound_ptr + group * 4 + 2)
        end = gl.load(bound_ptr + group * 4 + 3)
        out = gl.load(out_ptr + group * 2 + WHICH)
        valid = gl.load(panel_ptr + group * 4 + 3)
        acc = gl.zeros([64, TOKENS], gl.float32, ACC)
        for step in range(begin, end):
            mine = step < firsts
            if WHICH == 1:
                mine = (step < both) | (step >= firsts)
            mbarrier.wait(full.index(stage), phase)
            if mine:
                whole = (step < end - 1) | (valid == PARTS)
                if whole:
                    for part in gl.static_range(PARTS):
                        acc = _multiply(ws, xs, acc, stage, part, TRANSPOSED, PART)
                    acc = warpgroup_mma_wait(PARTS, deps=(acc,))
                else:  # what follows in memory is another row's, and zero times infinity is not a number
                    for part in gl.static_range(PARTS):
                        if part < valid:
                            acc = _multiply(ws, xs, acc, stage, part, TRANSPOSED, PART)
                            acc = warpgroup_mma_wait(0, deps=(acc,))
                    acc = warpgroup_mma_wait(0, deps=(acc,))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            previous = gl.where(stage == 0, STAGES - 1, stage - 1)
            mbarrier.arrive(empty.index(previous), count=1, pred=step > begin)
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        last = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(last), count=1, pred=end > begin)
        if HAS_BIAS:
            n = out + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
            bias = gl.load(bias_ptr + n, mask=(n >= 0) & (n < N), other=0.0)
            acc = acc + gl.expand_dims(bias.to(gl.float32), 1)
        acc = activate(acc, ACTIVATION)
        store_transposed(y_desc, acc, staging, token, out, TOKENS)
    tma.store_wait(0)


@gluon.jit
def narrow_kernel(
    y_desc,  # (M, N) in boxes of (TOKENS / 2, 64)
    x_desc, w_desc, bias_ptr,  # (K, M) if TRANSPOSED else (M, K), panels 64 wide, (N,)
    bins_ptr, tiles_ptr, bound_ptr, panel_ptr, column_ptr, out_ptr, N,
    HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, COLUMN: gl.constexpr,
    TRANSPOSED: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    SHARED: gl.constexpr = w_desc.layout
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    if TRANSPOSED:
        xs = gl.allocate_shared_memory(DTYPE, [STAGES * (64 // PART), PART, TOKENS], x_desc.layout)
    else:
        xs = gl.allocate_shared_memory(DTYPE, [STAGES * (64 // PART), TOKENS, PART], x_desc.layout)
    ws0 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], SHARED)
    ws1 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], SHARED)
    staging0 = gl.allocate_shared_memory(DTYPE, [TOKENS // 2, 64], SHARED)
    staging1 = gl.allocate_shared_memory(DTYPE, [TOKENS // 2, 64], SHARED)
    full, empty = make_ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_consume, (
                y_desc, bias_ptr, bins_ptr, tiles_ptr, bound_ptr, panel_ptr, out_ptr, N, xs, ws0, full, empty, staging0,
                0, HAS_BIAS, ACTIVATION, TRANSPOSED, PART, STAGES, TOKENS, ACC,
            )),
            (_consume, (
                y_desc, bias_ptr, bins_ptr, tiles_ptr, bound_ptr, panel_ptr, out_ptr, N, xs, ws1, full, empty, staging1,
                1, HAS_BIAS, ACTIVATION, TRANSPOSED, PART, STAGES, TOKENS, ACC,
            )),
            (_produce, (
                x_desc, w_desc, bins_ptr, tiles_ptr, bound_ptr, panel_ptr, column_ptr, xs, ws0, ws1, full, empty,
                COLUMN, TRANSPOSED, PART, STAGES, TOKENS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _run(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, width: int, activation: str,
    transpose: bool, tile: int | None,
) -> Tensor:  # fmt: skip
    tokens, (_, block_in, block_out) = x.shape[0], values.shape
    y = x.new_empty(tokens, width)
    work = stacks(topo, (block_out, block_in), transpose)
    programs = multiprocessors(x.device)
    if tile is None:  # narrow token tiles where wide ones would leave multiprocessors idle
        tile = 256 if len(work.cost) * cdiv(tokens, 256) >= 2 * programs else 128
    token_tiles = cdiv(tokens, tile)
    key = ("stacks", block_out, block_in, transpose)
    bins, order = tiles(topo, key, work.cost, token_tiles, programs)
    # Boxes 16 features wide are too narrow for the copy engine to keep up; those of a transposed copy are not.
    apart = work.part == 16
    panels = values.view(-1, block_out) if work.source is None else _panels(values, work, transpose)
    launch(
        narrow_kernel, (bins.numel() - 1, 1, 1),
        (
            descriptor(y, tile // 2, 64),
            descriptor(transposed(x), work.part, tile) if apart else descriptor(x, tile, work.part),
            descriptor(panels, 64, 64), y if bias is None else bias,
            bins, order, work.bound, work.panel, work.column, work.out, width,
        ),
        (
            bias is not None, activation, 64 if work.source is None else 0,
            apart, work.part, 4 if tile == 256 else 5, tile,
        ),
        x.device,
        num_warps=4,
    )  # fmt: skip
    return y


def dsd(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, out_features: int, activation: str = "",
    multiply: Tensor | None = None, *, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """`y = act(x W^T + bias) * multiply`; see `reference.dsd` for shapes. `tile` is 256 or 128 tokens."""
    y = _run(x, values, bias, topo, out_features, activation, False, tile)
    return y if multiply is None else y.mul_(multiply)


def dds(
    dy: Tensor,
    values: Tensor,
    topo: Topology,
    in_features: int,
    *,
    tile: int | None = None,
) -> Tensor:
    """`dx = dy W`; see `reference.dds` for shapes. `tile` is 256 or 128 tokens."""
    return _run(dy, values, None, topo, in_features, "", True, tile)
