"""`y = act(x W^T + bias)`, and the gated pair of them, for few tokens on Hopper GPUs: decoding.

The time is that of reading the stored blocks once. Every program streams an equal share of them, in storage order,
through a deep ring in shared memory; the tensor cores multiply each tile as it arrives (64 output features and more
are operand A, the few tokens are as wide as the instruction's least). Where the share of a block row ends inside it,
programs leave partial sums, and the last of them to finish adds these up, in order: results are the same from run to
run.

A kernel may start before the one in front of it on the stream has finished (programmatic dependent launch): it begins
to read weights at once and waits for its tokens. Weights that may have just been written are not read early.

    M tokens, `TOKENS` a tile; units of 64 packed columns by `BO` output features; `per` units a program
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsify.kernels.hopper_common import (
    activate,
    descriptor,
    load_tile,
    make_ring,
    multiprocessors,
    thread_barrier,
)
from sparsify.kernels.lasting import counters
from sparsify.kernels.launch import Relaunch
from sparsify.kernels.linear.work_decode import decode_work
from sparsify.kernels.schedule import plans, token, unchanged
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import cdiv, next_power_of_2

MAX_TOKENS = 64
# Shared memory of one program's ring: two programs fit a multiprocessor.
RING_BYTES = 100 << 10
# Weights that a program reads at the least: dividing a group further costs more than it saves.
LEAST_BYTES = 32 << 10
# From this size on there is work enough for all multiprocessors in groups of 128 features.
LARGE = 48 << 20


@gluon.jit
def _produce(
    x_desc, w_desc, w2_desc, units, token, column, count, firsts, ws, xs, full, empty,
    GATED: gl.constexpr, BI: gl.constexpr, BO: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Streams the units' weights, and the tokens' features that each of their parts needs."""
    WIDTH: gl.constexpr = 1 + 64 // BI
    BYTES: gl.constexpr = 128 * BO + 128 * TOKENS
    ahead = gl.minimum(count, STAGES)
    for i in range(ahead):
        mbarrier.expect(full.index(i), BYTES)
        row = gl.load(units + i * WIDTH)
        _fetch_weights(w_desc, w2_desc, row, column, i < firsts, ws, full, i, GATED)
    # Tokens come from the kernel before this one. Where that has to be over by now, this costs nothing.
    gdc_wait()
    gdc_launch_dependents()
    for i in range(ahead):
        _fetch_tokens(x_desc, units + i * WIDTH, token, xs, full, i, BI)
    stage = ahead % STAGES
    phase = 1 - ahead // STAGES
    for i in range(ahead, count):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), BYTES)
        unit = units + i * WIDTH
        _fetch_weights(w_desc, w2_desc, gl.load(unit), column, i < firsts, ws, full, stage, GATED)
        _fetch_tokens(x_desc, unit, token, xs, full, stage, BI)
        phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _fetch_weights(w_desc, w2_desc, row, column, first, ws, full, stage, GATED: gl.constexpr):
    if GATED:
        load_tile(w_desc, [row, column], full.index(stage), ws.index(stage), pred=first)
        load_tile(w2_desc, [row, column], full.index(stage), ws.index(stage), pred=first == 0)
    else:
        load_tile(w_desc, [row, column], full.index(stage), ws.index(stage))


@gluon.jit
def _fetch_tokens(x_desc, unit, token, xs, full, stage, BI: gl.constexpr):
    for part in gl.static_range(64 // BI):
        at = [token, gl.load(unit + 1 + part)]
        load_tile(x_desc, at, full.index(stage), xs.index(stage * (64 // BI) + part))


@gluon.jit
def _multiply(ws, xs, acc, stage, part: gl.constexpr, BI: gl.constexpr):
    """Starts `acc += weights @ tokens` for one part of a stage."""
    w = ws.index(stage).slice(part * BI, BI, dim=0).permute((1, 0))
    return warpgroup_mma(w, xs.index(stage * (64 // BI) + part).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _sum_units(ws, xs, full, empty, begin, end, valid, acc, BI: gl.constexpr, STAGES: gl.constexpr):
    """Adds the products of units `begin` to `end` up."""
    PARTS: gl.constexpr = 64 // BI
    for i in range(begin, end):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if (i < end - 1) | (valid == PARTS):
            for part in gl.static_range(PARTS):
                acc = _multiply(ws, xs, acc, stage, part, BI)
            acc = warpgroup_mma_wait(0, deps=(acc,))
        else:  # what follows in memory is another row's, and zero times infinity is not a number
            for part in gl.static_range(PARTS):
                if part < valid:
                    acc = _multiply(ws, xs, acc, stage, part, BI)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)
    return acc


@gluon.jit
def _consume(
    count, firsts, valid, valid2, ws, xs, full, empty,
    GATED: gl.constexpr, BI: gl.constexpr, BO: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """Sums of the first weight's units and of the second's."""
    acc = gl.zeros([BO, TOKENS], gl.float32, ACC)
    acc2 = gl.zeros([BO, TOKENS], gl.float32, ACC)
    if GATED:
        acc = _sum_units(ws, xs, full, empty, 0, firsts, valid, acc, BI, STAGES)
        acc2 = _sum_units(ws, xs, full, empty, firsts, count, valid2, acc2, BI, STAGES)
    else:
        acc = _sum_units(ws, xs, full, empty, 0, count, valid2, acc, BI, STAGES)
    return acc, acc2


@gluon.jit
def _add_up(sums, base, parts, SIZE: gl.constexpr, SUMS: gl.constexpr, offset, acc, TOGETHER: gl.constexpr):
    """Adds the programs' partial sums up in their order, several loads at a time."""
    for other in range(0, parts, TOGETHER):
        for i in gl.static_range(TOGETHER):
            theirs = sums + (base + other + i) * (SUMS * SIZE)
            acc += gl.load(theirs + offset, mask=other + i < parts, other=0.0, cache_modifier=".cg")
    return acc


@gluon.jit
def decode_kernel(
    x_desc, w_desc, w2_desc,  # (M, K) in boxes of (TOKENS, BI), (Z * bi, bo) in boxes of (64, BO)
    y_ptr, partial_ptr, arrived_ptr,  # (M, N), float32 (tiles, programs, SUMS, BO * TOKENS), int32 zeros
    bias_ptr, bias2_ptr, program_ptr, unit_ptr, M, N, most, groups,
    HAS_BIAS: gl.constexpr, HAS_BIAS2: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    HALVES: gl.constexpr, BI: gl.constexpr, BO: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    SIZE: gl.constexpr = BO * TOKENS
    SUMS: gl.constexpr = 2 if GATED else 1
    # Partial sums loaded at a time, as many as the registers hold.
    TOGETHER: gl.constexpr = 8 if SIZE * SUMS <= 1024 else 4 if SIZE * SUMS <= 4096 else 2
    program = gl.program_id(0)
    tile = gl.program_id(1)
    token = tile * TOKENS
    units = unit_ptr + program * most * (1 + 64 // BI)
    header = program_ptr + program * 7
    group = gl.load(header)
    count = gl.load(header + 1)
    firsts = gl.load(header + 2)
    parts = gl.load(header + 3)
    base = gl.load(header + 4)
    valid = gl.load(header + 5)
    valid2 = gl.load(header + 6)
    column = group % HALVES * BO
    ws = gl.allocate_shared_memory(DTYPE, [STAGES, 64, BO], w_desc.layout)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES * (64 // BI), TOKENS, BI], x_desc.layout)
    full, empty = make_ring(STAGES, 1)
    acc, acc2 = gl.warp_specialize(
        [
            (_consume, (count, firsts, valid, valid2, ws, xs, full, empty, GATED, BI, BO, STAGES, TOKENS, ACC)),
            (_produce, (
                x_desc, w_desc, w2_desc, units, token, column, count, firsts, ws, xs, full, empty,
                GATED, BI, BO, STAGES, TOKENS,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip
    o = gl.arange(0, BO, layout=gl.SliceLayout(1, ACC))
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, ACC))
    whole = parts == 1
    if parts > 1:
        offset = gl.expand_dims(o, 1) * TOKENS + gl.expand_dims(m, 0)
        sums = partial_ptr + (tile * gl.num_programs(0)).to(gl.int64) * (SUMS * SIZE)
        own = sums + program * (SUMS * SIZE)
        gl.store(own + offset, acc)
        if GATED:
            gl.store(own + SIZE + offset, acc2)
        thread_barrier()  # all threads have stored before one of them reports it
        whole = gl.atomic_add(arrived_ptr + tile * groups + group, 1, sem="acq_rel") == parts - 1
        if whole:
            zeros = gl.zeros([BO, TOKENS], gl.float32, ACC)
            acc = _add_up(sums, base, parts, SIZE, SUMS, offset, zeros, TOGETHER)
            if GATED:
                acc2 = _add_up(sums + SIZE, base, parts, SIZE, SUMS, offset, zeros, TOGETHER)
            gl.store(arrived_ptr + tile * groups + group, 0)
    if whole:
        n = group * BO + o
        if HAS_BIAS:
            acc += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
        acc = activate(acc, ACTIVATION)
        if GATED:
            if HAS_BIAS2:
                acc2 += gl.expand_dims(gl.load(bias2_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
            acc = acc * acc2
        out = y_ptr + gl.expand_dims((token + m).to(gl.int64), 0) * N + gl.expand_dims(n, 1)
        inside = gl.expand_dims(token + m < M, 0) & gl.expand_dims(n < N, 1)
        gl.store(out, acc.to(DTYPE), mask=inside)


Weight: TypeAlias = tuple[Tensor, Tensor | None, Topology]


class _Plan:
    """All of a call that does not depend on what its operands hold or where they lie."""

    def __init__(self, x: Tensor, weights: Sequence[Weight], width: int, activation: str) -> None:
        tokens, (_, block_in, block_out) = x.shape[0], weights[0][0].shape
        tile = min(MAX_TOKENS, max(8, next_power_of_2(tokens)))
        self.tiles, sums = cdiv(tokens, tile), len(weights)
        # High groups read memory in longer runs; low ones have less to add up, and are more: all units are busy.
        large = sum(values.nbytes for values, _, _ in weights) >= LARGE
        height = min(block_out, 128 if sums * tile <= 64 and (tile == 8 or large) else 64)
        topos = [topo for _, _, topo in weights]
        self.work = work = decode_work(
            topos, (block_out, block_in), height,
            4 * multiprocessors(x.device), LEAST_BYTES // (128 * height), 8 if tile <= 16 else 4,
        )  # fmt: skip
        programs = work.programs.shape[0]
        self.shape = tokens, width
        self.partial = self.tiles * programs * sums * height * tile if work.divided else 0
        self.boxes = (
            partial(descriptor, rows=tile, columns=min(block_in, 64)),
            lambda values: descriptor(values.view(-1, block_out), 64, height),
        )
        bias, bias2 = weights[0][1], weights[-1][1]
        self.launch = Relaunch(
            decode_kernel, (programs, self.tiles, 1),
            (
                bias is not None, bias2 is not None, activation, sums == 2,
                block_out // height, min(block_in, 64), height,
                min(14, RING_BYTES // (128 * (height + tile))), tile,
            ),
            x.device,
            num_warps=4, maxnreg=128,
        )  # fmt: skip

    def __call__(self, x: Tensor, weights: Sequence[Weight], early: bool) -> Tensor:
        y, work = x.new_empty(self.shape), self.work
        sums = x.new_empty(self.partial, dtype=torch.float32) if self.partial else work.unused
        (values, bias, _), (values2, bias2, _) = weights[0], weights[-1]
        token_box, weight_box = self.boxes
        self.launch(
            (
                y, sums, counters(x.device, self.tiles * work.groups),
                y if bias is None else bias, y if bias2 is None else bias2,
                work.programs, work.units, *self.shape, work.most, work.groups,
            ),
            ((token_box, x), (weight_box, values), (weight_box, values2)),
            early,
        )  # fmt: skip
        return y


def _run(x: Tensor, weights: Sequence[Weight], width: int, activation: str) -> Tensor:
    frozen = [unchanged(values) for values, _, _ in weights]  # of each: it takes note of them
    early = all(frozen) and not torch.is_grad_enabled()
    operands = [
        (id(token(topo)), values.shape, bias if bias is None else bias.data_ptr() % 16)
        for values, bias, topo in weights
    ]
    key = ("decode", x.shape[0], x.stride(0), x.dtype, width, activation, *operands)
    first, last = weights[0][2], weights[-1][2]
    kept = plans(first)
    # A pair's plan is kept with the first weight's indices; the second's may have gone, and its number used again.
    plan, second = kept.get(key, (None, None))
    if plan is None or second() is not token(last):
        plan = _Plan(x, weights, width, activation)
        kept[key] = plan, weakref.ref(token(last))
    return plan(x, weights, early)


def dsd(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, out_features: int, activation: str = "",
    multiply: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`y = act(x W^T + bias) * multiply`; see `reference.dsd` for shapes."""
    y = _run(x, [(values, bias, topo)], out_features, activation)
    return y if multiply is None else y.mul_(multiply)


def gated(
    x: Tensor,
    gate_values: Tensor, gate_bias: Tensor | None, gate_topo: Topology,
    up_values: Tensor, up_bias: Tensor | None, up_topo: Topology,
    out_features: int, activation: str,
) -> Tensor:  # fmt: skip
    """`y = act(x G^T + gate bias) * (x U^T + up bias)`; see `reference.gated` for shapes."""
    if up_values.numel() == 0:  # nothing to read: the copy engine wants an address
        y = dsd(x, gate_values, gate_bias, gate_topo, out_features, activation)
        return y.zero_() if up_bias is None else y.mul_(up_bias)
    weights = [(gate_values, gate_bias, gate_topo), (up_values, up_bias, up_topo)]
    return _run(x, weights, out_features, activation)
