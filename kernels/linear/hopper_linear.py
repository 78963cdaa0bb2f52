"""`y = act(x W^T + bias)` and `dx = dy W` on Hopper GPUs, for blocks whose sides are multiples of 64.

One kernel serves both: they differ in which way round a sub-block is read. The sub-block is operand A of the tensor
cores, 64 output features by 64 contracted ones; a tile of tokens is operand B, as wide as the instruction takes.

    M tokens, `TOKENS` a tile; `STAGES` stages of (TOKENS + 2 * 64) x 64 elements
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

from functools import partial

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
from sparsify.kernels.launch import Relaunch
from sparsify.kernels.linear.work_square import steps
from sparsify.kernels.schedule import plans, tiles
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import cdiv


@gluon.jit
def _produce(
    x_desc, w_desc,
    bins_ptr, tiles_ptr, ptr_ptr, column_ptr, first_ptr, second_ptr,
    xs, ws0, ws1, full, empty,
    PAIRED: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    stage = 0
    phase = 1
    for i in range(gl.load(bins_ptr + program), gl.load(bins_ptr + program + 1)):
        tile = gl.load(tiles_ptr + i)
        group = tile & 0xFFFF
        token = (tile >> 16) * TOKENS
        begin = gl.load(ptr_ptr + group)
        end = gl.load(ptr_ptr + group + 1)
        # Metadata is read one step ahead, so that its latency hides behind the wait for a free stage.
        column = gl.load(column_ptr + begin)
        first = gl.load(first_ptr + begin)
        second = gl.load(second_ptr + begin)
        for step in range(begin, end):
            next_column = gl.load(column_ptr + step + 1)
            next_first = gl.load(first_ptr + step + 1)
            next_second = gl.load(second_ptr + step + 1)
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            has_first = first >= 0
            has_second = second >= 0
            if PAIRED:
                both = has_first & has_second
                mbarrier.expect(bar, TOKENS * 128 + 16384, pred=both)
                mbarrier.expect(bar, TOKENS * 128 + 8192, pred=both == 0)
            else:
                mbarrier.expect(bar, TOKENS * 128 + 16384)
            load_tile(x_desc, [token, column * 64], bar, xs.index(stage))
            at0 = [first // SUBS * 64, first % SUBS * 64]
            at1 = [second // SUBS * 64, second % SUBS * 64]
            load_tile(w_desc, at0, bar, ws0.index(stage), pred=has_first)
            load_tile(w_desc, at1, bar, ws1.index(stage), pred=has_second)
            column = next_column
            first = next_first
            second = next_second
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _multiply(ws, xs, acc, stage, TRANSPOSED: gl.constexpr):
    """Starts `acc += sub-block @ tokens` for one stage."""
    if TRANSPOSED:
        return warpgroup_mma(ws.index(stage), xs.index(stage).permute((1, 0)), acc, is_async=True)
    else:
        w = ws.index(stage).permute((1, 0))
        return warpgroup_mma(w, xs.index(stage).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _consume(
    y_desc, bias_ptr,
    bins_ptr, tiles_ptr, ptr_ptr, sub_ptr, out_ptr, N,
    xs, ws, full, empty, staging,
    PAIRED: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr, TOKENS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    stage = 0
    phase = 0
    for i in range(gl.load(bins_ptr + program), gl.load(bins_ptr + program + 1)):
        tile = gl.load(tiles_ptr + i)
        group = tile & 0xFFFF
        token = (tile >> 16) * TOKENS
        begin = gl.load(ptr_ptr + group)
        end = gl.load(ptr_ptr + group + 1)
        out = gl.load(out_ptr + group)
        acc = gl.zeros([64, TOKENS], gl.float32, ACC)
        sub = gl.load(sub_ptr + begin)
        for step in range(begin, end):
            next_sub = gl.load(sub_ptr + step + 1)
            mbarrier.wait(full.index(stage), phase)
            if PAIRED:
                if sub >= 0:
                    acc = _multiply(ws, xs, acc, stage, TRANSPOSED)
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                else:
                    acc = warpgroup_mma_wait(0, deps=(acc,))
            else:
                acc = _multiply(ws, xs, acc, stage, TRANSPOSED)
                acc = warpgroup_mma_wait(1, deps=(acc,))
            previous = gl.where(stage == 0, STAGES - 1, stage - 1)
            mbarrier.arrive(empty.index(previous), count=1, pred=step > begin)
            sub = next_sub
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
def linear_kernel(
    y_desc,  # (M, N) in boxes of (TOKENS / 2, 64)
    x_desc, w_desc, bias_ptr,  # (M, K) in boxes of (TOKENS, 64), (Z * bi, bo) in boxes of (64, 64), (N,)
    bins_ptr, tiles_ptr, ptr_ptr, column_ptr, first_ptr, second_ptr, first_out_ptr, second_out_ptr, N,
    PAIRED: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    SUBS: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    SHARED: gl.constexpr = x_desc.layout
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, 64], SHARED)
    ws0 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], SHARED)
    ws1 = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], SHARED)
    staging0 = gl.allocate_shared_memory(DTYPE, [TOKENS // 2, 64], SHARED)
    staging1 = gl.allocate_shared_memory(DTYPE, [TOKENS // 2, 64], SHARED)
    full, empty = make_ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_consume, (
                y_desc, bias_ptr, bins_ptr, tiles_ptr, ptr_ptr, first_ptr, first_out_ptr, N,
                xs, ws0, full, empty, staging0, PAIRED, TRANSPOSED, HAS_BIAS, ACTIVATION, STAGES, TOKENS, ACC,
            )),
            (_consume, (
                y_desc, bias_ptr, bins_ptr, tiles_ptr, ptr_ptr, second_ptr, second_out_ptr, N,
                xs, ws1, full, empty, staging1, PAIRED, TRANSPOSED, HAS_BIAS, ACTIVATION, STAGES, TOKENS, ACC,
            )),
            (_produce, (
                x_desc, w_desc, bins_ptr, tiles_ptr, ptr_ptr, column_ptr, first_ptr, second_ptr,
                xs, ws0, ws1, full, empty, PAIRED, SUBS, STAGES, TOKENS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


class _Plan:
    """All of a call that does not depend on what its operands hold or where they lie."""

    def __init__(
        self, x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, width: int, activation: str,
        transpose: bool, tile: int | None,
    ) -> None:  # fmt: skip
        tokens, (_, block_in, block_out) = x.shape[0], values.shape
        self.shape, programs = (tokens, width), multiprocessors(x.device)
        self.work = work = steps(topo, (block_out, block_in), transpose)
        if tile is None:  # narrow token tiles where wide ones would leave multiprocessors idle
            tile = 256 if len(work.cost) * cdiv(tokens, 256) >= 2 * programs else 128
        key = block_out, block_in, transpose
        self.bins, self.order = tiles(topo, key, work.cost, cdiv(tokens, tile), programs)
        self.boxes = (
            partial(descriptor, rows=tile // 2, columns=64),
            partial(descriptor, rows=tile, columns=64),
            lambda values: descriptor(values.view(-1, block_out), 64, 64),
        )
        self.launch = Relaunch(
            linear_kernel, (self.bins.numel() - 1, 1, 1),
            (
                work.paired, transpose, bias is not None, activation,
                block_out // 64, 4 if tile == 256 else 5, tile,
            ),
            x.device,
            num_warps=4,
        )  # fmt: skip

    def __call__(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        y, work = x.new_empty(self.shape), self.work
        result_box, token_box, weight_box = self.boxes
        self.launch(
            (
                y if bias is None else bias, self.bins, self.order,
                work.ptr, work.column, work.first, work.second, work.first_out, work.second_out, self.shape[1],
            ),
            ((result_box, y), (token_box, x), (weight_box, values)),
        )  # fmt: skip
        return y


def _run(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, width: int, activation: str,
    transpose: bool, tile: int | None,
) -> Tensor:  # fmt: skip
    aligned = bias if bias is None else bias.data_ptr() % 16
    key = (
        "linear",
        x.shape[0],
        x.stride(0),
        x.dtype,
        width,
        values.shape,  # not its address: in mixed precision it is another copy in each step
        aligned,
        activation,
        transpose,
        tile,
    )
    kept = plans(topo)
    plan = kept.get(key)
    if plan is None:
        plan = kept[key] = _Plan(x, values, bias, topo, width, activation, transpose, tile)
    return plan(x, values, bias)


def dsd(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, out_features: int, activation: str = "",
    multiply: Tensor | None = None, *, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """`y = act(x W^T + bias) * multiply`; see `reference.dsd` for shapes. `tile` is 256 or 128 tokens."""
    y = _run(x, values, bias, topo, out_features, activation, False, tile)
    return y if multiply is None else y.mul_(multiply)


def dds(dy: Tensor, values: Tensor, topo: Topology, in_features: int, *, tile: int | None = None) -> Tensor:
    """`dx = dy W`; see `reference.dds` for shapes. `tile` is 256 or 128 tokens."""
    return _run(dy, values, None, topo, in_features, "", True, tile)
