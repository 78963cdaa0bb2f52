"""`dW = dy^T x` at stored blocks on Hopper GPUs, for blocks whose sides are multiples of 64.

Each consumer sums 64 output features (operand A, from `dy`) by two sub-blocks of 64 input features (operand B, from
`x`) over all tokens. Where blocks are at least 128 high both consumers read the same columns of `x`; elsewhere they
read the same features of `dy` wherever a row has blocks enough for both.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsify.kernels.hopper_common import (
    descriptor,
    load_tile,
    make_ring,
    multiprocessors,
    store_tile,
    view_as,
)
from sparsify.kernels.launch import launch
from sparsify.kernels.linear.work_square import units
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import cdiv


@gluon.jit
def _produce(
    dy_desc, x_desc, units_ptr, U, steps,
    xs0, xs1, dys, full, empty,
    SHARED_X: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for unit in range(gl.program_id(0), U, gl.num_programs(0)):
        row = units_ptr + unit * 10
        dy0 = gl.load(row) * 64
        dy1 = gl.load(row + 1) * 64
        x00 = gl.load(row + 2) * 64
        x01 = gl.load(row + 3) * 64
        x10 = gl.load(row + 4) * 64
        x11 = gl.load(row + 5) * 64
        two = dy0 != dy1
        for step in range(steps):
            token = step * 64
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            X_BYTES: gl.constexpr = 16384 if SHARED_X else 32768
            mbarrier.expect(bar, X_BYTES + 16384, pred=two)
            mbarrier.expect(bar, X_BYTES + 8192, pred=two == 0)
            load_tile(dy_desc, [token, dy0], bar, dys.index(stage * 2))
            load_tile(dy_desc, [token, dy1], bar, dys.index(stage * 2 + 1), pred=two)
            load_tile(x_desc, [token, x00], bar, xs0.index(stage * 2))
            load_tile(x_desc, [token, x01], bar, xs0.index(stage * 2 + 1))
            if not SHARED_X:
                load_tile(x_desc, [token, x10], bar, xs1.index(stage * 2))
                load_tile(x_desc, [token, x11], bar, xs1.index(stage * 2 + 1))
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _consume(
    dw_desc, units_ptr, U, steps,
    xs, dys, full, empty, staging,
    WHICH: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    for unit in range(gl.program_id(0), U, gl.num_programs(0)):
        acc = gl.zeros([64, 128], gl.float32, ACC)
        row = units_ptr + unit * 10
        own = 0
        if WHICH == 1:
            own = (gl.load(row) != gl.load(row + 1)).to(gl.int32)
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(
                dys.index(stage * 2 + own).permute((1, 0)), xs.index(stage), acc, is_async=True
            )
            acc = warpgroup_mma_wait(1, deps=(acc,))
            previous = gl.where(stage == 0, STAGES - 1, stage - 1)
            mbarrier.arrive(empty.index(previous), count=1, pred=step > 0)
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        last = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(last), count=1, pred=steps > 0)
        tma.store_wait(0)
        staging.permute((1, 0)).store(acc.to(dw_desc.dtype))
        fence_async_shared()
        for i in gl.static_range(2):
            sub = gl.load(row + 6 + WHICH * 2 + i)
            if sub >= 0:
                part = staging.slice(i * 64, 64, dim=0)
                store_tile(dw_desc, [sub // SUBS * 64, sub % SUBS * 64], part)
    tma.store_wait(0)


@gluon.jit
def sdd_kernel(
    dw_desc,  # (Z * bi, bo) in boxes of (64, 64)
    dy_desc, x_desc, units_ptr, U, steps,  # (M, N) and (M, K) in boxes of (64, 64), (U, 10)
    SHARED_X: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    SHARED: gl.constexpr = x_desc.layout
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    xs0 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 128], SHARED)
    dys = gl.allocate_shared_memory(DTYPE, [STAGES * 2, 64, 64], SHARED)
    staging0 = gl.allocate_shared_memory(DTYPE, [128, 64], SHARED)
    staging1 = gl.allocate_shared_memory(DTYPE, [128, 64], SHARED)
    xs1 = xs0
    if not SHARED_X:
        xs1 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 128], SHARED)
    # The two 64-wide halves of a stage lie one after the other: the producer fills them one by one.
    halves0 = view_as(xs0, DTYPE, [STAGES * 2, 64, 64], SHARED)
    halves1 = view_as(xs1, DTYPE, [STAGES * 2, 64, 64], SHARED)
    full, empty = make_ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_consume, (
                dw_desc, units_ptr, U, steps, xs0, dys, full, empty, staging0, 0, SUBS, STAGES, ACC,
            )),
            (_consume, (
                dw_desc, units_ptr, U, steps, xs1, dys, full, empty, staging1, 1, SUBS, STAGES, ACC,
            )),
            (_produce, (
                dy_desc, x_desc, units_ptr, U, steps, halves0, halves1, dys, full, empty, SHARED_X, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def sdd(dy: Tensor, x: Tensor, topo: Topology, block_in: int, block_out: int) -> Tensor:
    """`dW = dy^T x` at stored blocks; see `reference.sdd` for shapes."""
    work = units(topo, (block_out, block_in))
    dw = x.new_empty(topo.col.numel(), block_in, block_out)
    count = work.table.shape[0]
    if count == 0:
        return dw
    launch(
        sdd_kernel, (min(multiprocessors(x.device), count), 1, 1),
        (
            descriptor(dw.view(-1, block_out), 64, 64),
            descriptor(dy, 64, 64), descriptor(x, 64, 64), work.table, count, cdiv(x.shape[0], 64),
        ),
        (work.shared, block_out // 64, 6 if work.shared else 4),
        x.device,
        num_warps=4,
    )  # fmt: skip
    return dw
