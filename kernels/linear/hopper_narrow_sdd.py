"""`dW = dy^T x` at stored blocks on Hopper GPUs for blocks with a side of 16 or 32.

Each consumer sums a stack of 64 output features (operand A, from `dy`) by 128 input features (operand B) over all
tokens: those of the columns that any block row of the stack has, gathered as rows of a transposed copy of `x`, which is
made here and whose time is part of the kernel's. Only stored blocks are written. Where blocks are at least 128 high
both consumers read the same input features.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsify.kernels.hopper_common import descriptor, load_tile, make_ring, multiprocessors, view_as
from sparsify.kernels.launch import launch
from sparsify.kernels.linear.hopper_narrow import transposed
from sparsify.kernels.linear.work_narrow import narrow_units
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import cdiv


@gluon.jit
def _produce(
    dy_desc, xt_desc, table_ptr, U, steps,
    xs0, xs1, dys, full, empty,
    SHARED_X: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 128 // PART
    X_BYTES: gl.constexpr = 16384 if SHARED_X else 32768
    stage = 0
    phase = 1
    for unit in range(gl.program_id(0), U, gl.num_programs(0)):
        row = table_ptr + unit * (2 + 2 * PARTS)
        dy0 = gl.load(row)
        dy1 = gl.load(row + 1)
        two = dy0 != dy1
        for step in range(steps):
            token = step * 64
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, X_BYTES + 16384, pred=two)
            mbarrier.expect(bar, X_BYTES + 8192, pred=two == 0)
            load_tile(dy_desc, [token, dy0], bar, dys.index(stage * 2))
            load_tile(dy_desc, [token, dy1], bar, dys.index(stage * 2 + 1), pred=two)
            for part in gl.static_range(PARTS):
                load_tile(xt_desc, [gl.load(row + 2 + part), token], bar, xs0.index(stage * PARTS + part))
                if not SHARED_X:
                    other = gl.load(row + 2 + PARTS + part)
                    load_tile(xt_desc, [other, token], bar, xs1.index(stage * PARTS + part))
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _consume(
    dw_ptr, table_ptr, cells_ptr, U, steps,
    xs, dys, full, empty,
    WHICH: gl.constexpr, BO: gl.constexpr, HIGH: gl.constexpr, PART: gl.constexpr,
    STAGES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 128 // PART
    CELLS: gl.constexpr = 64 // HIGH * PARTS
    o = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)), 1)
    f = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, ACC)), 0)
    stage = 0
    phase = 0
    for unit in range(gl.program_id(0), U, gl.num_programs(0)):
        row = table_ptr + unit * (2 + 2 * PARTS)
        own = 0
        if WHICH == 1:
            own = (gl.load(row) != gl.load(row + 1)).to(gl.int32)
        acc = gl.zeros([64, 128], gl.float32, ACC)
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            dy = dys.index(stage * 2 + own).permute((1, 0))
            acc = warpgroup_mma(dy, xs.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            previous = gl.where(stage == 0, STAGES - 1, stage - 1)
            mbarrier.arrive(empty.index(previous), count=1, pred=step > 0)
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        last = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(last), count=1, pred=steps > 0)
        cell = gl.load(cells_ptr + (unit * 2 + WHICH) * CELLS + (o // HIGH) * PARTS + f // PART)
        gl.store(
            dw_ptr + cell + (o % HIGH) + (f % PART) * BO, acc.to(dw_ptr.dtype.element_ty), mask=cell >= 0
        )


@gluon.jit
def narrow_sdd_kernel(
    dw_ptr, dy_desc, xt_desc,  # (Z, bi, bo), (M, N) in boxes of (64, 64), (K, M) in boxes of (PART, 64)
    table_ptr, cells_ptr, U, steps,
    SHARED_X: gl.constexpr, BO: gl.constexpr, HIGH: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = dy_desc.dtype
    SHARED: gl.constexpr = dy_desc.layout
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    xs0 = gl.allocate_shared_memory(DTYPE, [STAGES, 128, 64], SHARED)
    xs1 = xs0
    if not SHARED_X:
        xs1 = gl.allocate_shared_memory(DTYPE, [STAGES, 128, 64], SHARED)
    dys = gl.allocate_shared_memory(DTYPE, [STAGES * 2, 64, 64], SHARED)
    # The parts of a stage lie one after the other: the producer fills them one by one.
    parts0 = view_as(xs0, DTYPE, [STAGES * (128 // PART), PART, 64], SHARED)
    parts1 = view_as(xs1, DTYPE, [STAGES * (128 // PART), PART, 64], SHARED)
    full, empty = make_ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_consume, (
                dw_ptr, table_ptr, cells_ptr, U, steps, xs0, dys, full, empty, 0, BO, HIGH, PART, STAGES, ACC,
            )),
            (_consume, (
                dw_ptr, table_ptr, cells_ptr, U, steps, xs1, dys, full, empty, 1, BO, HIGH, PART, STAGES, ACC,
            )),
            (_produce, (
                dy_desc, xt_desc, table_ptr, U, steps, parts0, parts1, dys, full, empty, SHARED_X, PART, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def sdd(dy: Tensor, x: Tensor, topo: Topology, block_in: int, block_out: int) -> Tensor:
    """`dW = dy^T x` at stored blocks; see `reference.sdd` for shapes."""
    work = narrow_units(topo, (block_out, block_in))
    dw = x.new_empty(topo.col.numel(), block_in, block_out)
    count = work.table.shape[0]
    if count == 0:
        return dw
    launch(
        narrow_sdd_kernel, (min(multiprocessors(x.device), count), 1, 1),
        (
            dw, descriptor(dy, 64, 64), descriptor(transposed(x), work.part, 64),
            work.table, work.cells, count, cdiv(x.shape[0], 64),
        ),
        (work.shared, block_out, work.high, work.part, 6 if work.shared else 4),
        x.device,
        num_warps=4,
    )  # fmt: skip
    return dw
