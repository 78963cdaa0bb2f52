"""`y = x W^T + bias` on Hopper GPUs for tall, narrow blocks: at least 128 output features by 16 or 32 input ones.

The panel of a block row is contiguous, so 64 packed columns of weights are one copy whatever `bi` is. The activations
of those columns lie apart; they are read from a transposed copy of `x`, where each is a row of consecutive tokens.
The copy is made here and its time is part of the kernel's.
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

from sparsify.kernels.hopper_common import descriptor, load_tile, make_ring, multiprocessors, store_transposed
from sparsify.kernels.launch import launch
from sparsify.kernels.schedule import tall_steps, tiles
from sparsify.kernels.storage import Topology


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


def _transposed(x: Tensor) -> Tensor:
    """`(K, M)` copy of `x` `(M, K)` whose rows are padded to what the copy engine can address."""
    tokens, features = x.shape
    xt = x.new_empty(features, triton.cdiv(tokens, 8) * 8)[:, :tokens]
    grid = (triton.cdiv(tokens, 64), triton.cdiv(features, 64), 1)
    strides = (x.stride(0), xt.stride(0))
    launch(_transpose_kernel, grid, (xt, x, tokens, features, *strides), (64, 64), x.device, num_warps=4)
    return xt


@gluon.jit
def _produce(
    x_desc, w_desc,
    bins_ptr, tiles_ptr, ptr_ptr, panel_ptr, panel_column_ptr, column_ptr,
    xs, ws0, ws1, full, empty,
    BI: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 64 // BI
    program = gl.program_id(0)
    stage = 0
    phase = 1
    for i in range(gl.load(bins_ptr + program), gl.load(bins_ptr + program + 1)):
        tile = gl.load(tiles_ptr + i)
        group = tile & 0xFFFF
        token = (tile >> 16) * TOKENS
        panel = gl.load(panel_ptr + group)
        panel_column = gl.load(panel_column_ptr + group)
        for step in range(gl.load(ptr_ptr + group), gl.load(ptr_ptr + group + 1)):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, TOKENS * 128 + 16384)
            for part in gl.static_range(PARTS):
                column = gl.load(column_ptr + step * PARTS + part) * BI
                load_tile(x_desc, [column, token], bar, xs.index(stage * PARTS + part))
            load_tile(w_desc, [panel, panel_column], bar, ws0.index(stage))
            load_tile(w_desc, [panel, panel_column + 64], bar, ws1.index(stage))
            panel += 64
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _consume(
    y_desc, bias_ptr,
    bins_ptr, tiles_ptr, ptr_ptr, out_ptr, N,
    xs, ws, full, empty, staging,
    HALF: gl.constexpr, HAS_BIAS: gl.constexpr,
    BI: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 64 // BI
    program = gl.program_id(0)
    stage = 0
    phase = 0
    for i in range(gl.load(bins_ptr + program), gl.load(bins_ptr + program + 1)):
        tile = gl.load(tiles_ptr + i)
        group = tile & 0xFFFF
        token = (tile >> 16) * TOKENS
        begin = gl.load(ptr_ptr + group)
        end = gl.load(ptr_ptr + group + 1)
        out = gl.load(out_ptr + group) + HALF * 64
        acc = gl.zeros([64, TOKENS], gl.float32, ACC)
        for step in range(begin, end):
            mbarrier.wait(full.index(stage), phase)
            for part in gl.static_range(PARTS):
                w = ws.index(stage).slice(part * BI, BI, dim=0).permute((1, 0))
                acc = warpgroup_mma(w, xs.index(stage * PARTS + part), acc, is_async=True)
            acc = warpgroup_mma_wait(PARTS, deps=(acc,))
            previous = gl.where(stage == 0, STAGES - 1, stage - 1)
            mbarrier.arrive(empty.index(previous), count=1, pred=step > begin)
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        last = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(last), count=1, pred=end > begin)
        if HAS_BIAS:
            n = out + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
            bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
            acc = acc + gl.expand_dims(bias.to(gl.float32), 1)
        store_transposed(y_desc, acc, staging, token, out, TOKENS)
    tma.store_wait(0)


@gluon.jit
def tall_kernel(
    y_desc,  # (M, N) in boxes of (TOKENS / 2, 64)
    x_desc, w_desc, bias_ptr,  # (K, M) in boxes of (BI, TOKENS), (Z * BI, bo) in boxes of (64, 64), (N,)
    bins_ptr, tiles_ptr, ptr_ptr, panel_ptr, panel_column_ptr, column_ptr, out_ptr, N,
    HAS_BIAS: gl.constexpr, BI: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    SHARED: gl.constexpr = x_desc.layout
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    xs = gl.allocate_shared_memory(DTYPE, [STAGES * (64 // BI), BI, TOKENS], SHARED)
    ws0 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], SHARED)
    ws1 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], SHARED)
    staging0 = gl.allocate_shared_memory(DTYPE, [TOKENS // 2, 64], SHARED)
    staging1 = gl.allocate_shared_memory(DTYPE, [TOKENS // 2, 64], SHARED)
    full, empty = make_ring(STAGES)
    gl.warp_specialize(
        [
            (_consume, (
                y_desc, bias_ptr, bins_ptr, tiles_ptr, ptr_ptr, out_ptr, N,
                xs, ws0, full, empty, staging0, 0, HAS_BIAS, BI, STAGES, TOKENS, ACC,
            )),
            (_consume, (
                y_desc, bias_ptr, bins_ptr, tiles_ptr, ptr_ptr, out_ptr, N,
                xs, ws1, full, empty, staging1, 1, HAS_BIAS, BI, STAGES, TOKENS, ACC,
            )),
            (_produce, (
                x_desc, w_desc, bins_ptr, tiles_ptr, ptr_ptr, panel_ptr, panel_column_ptr, column_ptr,
                xs, ws0, ws1, full, empty, BI, STAGES, TOKENS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def dsd(x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, out_features: int) -> Tensor:
    """`y = x W^T + bias`; see `reference.dsd` for shapes."""
    tokens, (_, block_in, block_out) = x.shape[0], values.shape
    y = x.new_empty(tokens, out_features)
    work = tall_steps(topo, (block_out, block_in))
    programs = multiprocessors(x.device)
    wide = len(work.cost) * triton.cdiv(tokens, 256) >= 2 * programs
    tile, stages = (256, 4) if wide else (128, 5)
    token_tiles = triton.cdiv(tokens, tile)
    bins, order = tiles(topo, ("tall", block_out, block_in), work.cost, token_tiles, programs)
    launch(
        tall_kernel, (bins.numel() - 1, 1, 1),
        (
            descriptor(y, tile // 2, 64),
            descriptor(_transposed(x), block_in, tile), descriptor(values.view(-1, block_out), 64, 64),
            y if bias is None else bias,
            bins, order, work.ptr, work.panel, work.panel_column, work.column, work.out, out_features,
        ),
        (bias is not None, block_in, stages, tile),
        x.device,
        num_warps=4,
    )  # fmt: skip
    return y
