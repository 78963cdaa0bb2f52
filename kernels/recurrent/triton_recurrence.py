"""All time steps of an LSTM or GRU layer in one launch: a persistent kernel, and one for the way back.

Each program owns some hidden units for all of time. In a step it multiplies the whole hidden state with the blocks that
reach its units, whose weights stay in the L2 cache from step to step, and applies the functions of the gates at once;
then all programs wait for each other (a counter in memory), since the next step reads what every one of them has
written. A step so costs the reading of the weights and one such meeting, instead of two launches. All programs have to
run at the same time: there are no more of them than multiprocessors, and the launch is a cooperative one.

Idea: Diamos et al., "Persistent RNNs" (2016); there the weights stay in registers.

    T time steps, B sequences, H hidden units, stored blocks of (BI, BO), tiles of BM sequences by U units
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.launch import launch
from sparsify.kernels.recurrent.triton_cells import tanh
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import INTERPRET, cdiv, dot, dot_options, next_power_of_2

# Beyond so many sequences the products of the separate steps are large enough to be better off by themselves.
MAX_BATCH = 128
SMALLEST_TILE = 16
# Shared memory for the operands of one gate's product.
TILE_BYTES = 18 << 10


def takes(x: Tensor, values: Tensor, units: int, sizes: Sequence[int]) -> bool:
    """Whether these kernels run a recurrence: sequences of one length, units and blocks in multiples of 16."""
    _, block_in, block_out = values.shape
    even = len(sizes) > 1 and sizes[0] == sizes[-1] and 0 < sizes[0] <= MAX_BATCH
    return even and units % SMALLEST_TILE == 0 and min(block_in, block_out) >= SMALLEST_TILE


@triton.jit
def _meet(counter_ptr, arrivals):
    """Waits until `arrivals` programs have come here; what they wrote before is visible after."""
    tl.debug_barrier()  # all threads have stored before one of them reports it
    tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _place(tile, B, H, BM: tl.constexpr, U: tl.constexpr):
    """First unit of a tile, its sequences, where they lie in `(B, H)`, and which of them exist."""
    unit = tile % (H // U) * U
    m = tile // (H // U) * BM + tl.arange(0, BM)
    at = m.to(tl.int64)[:, None] * H + unit + tl.arange(0, U)[None, :]
    return unit, m, at, (m < B)[:, None] & (tl.arange(0, U) >= 0)[None, :]


@triton.jit
def _row(crow_ptr, first, BI: tl.constexpr, BO: tl.constexpr):
    """Of the block row that holds the outputs from `first` on: its first block, and its packed columns."""
    begin = tl.load(crow_ptr + first // BO)
    return begin, (tl.load(crow_ptr + first // BO + 1) - begin) * BI


@triton.jit
def _add_product(
    acc, h_ptr, values_ptr, col_ptr, first, begin, packed, start, m, B, K,
    BI: tl.constexpr, BO: tl.constexpr, U: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds `BK` packed columns' part of the hidden state's product with the outputs from `first` on, `(BM, U)`."""
    step = start + tl.arange(0, BK)
    inside = step < packed
    k = tl.load(col_ptr + begin + step // BI, mask=inside, other=0) * BI + step % BI
    # Other multiprocessors wrote the hidden state: it must not come from this one's L1 cache.
    x = tl.load(
        h_ptr + m.to(tl.int64)[:, None] * K + k[None, :],
        mask=(m < B)[:, None] & (inside & (k < K))[None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    panel_ptr = values_ptr + begin.to(tl.int64) * (BI * BO) + first % BO
    w = tl.load(
        panel_ptr + step[:, None] * BO + tl.arange(0, U)[None, :], mask=inside[:, None], other=0.0
    )  # [BK, U]
    return dot(x, w, acc, PRECISION, WIDEN)


@triton.jit
def _forward_kernel(
    y_ptr, c_ptr, saved_ptr, before_ptr, counter_ptr,  # [T, B, H], [B, H], [T, B, 4 H], [T, B, H], [1] zero
    gates_ptr, h0_ptr, values_ptr, bias_ptr, crow_ptr, col_ptr,  # [T, B, G H], [B, H], [Z, BI, BO], [G H], ...
    T, B, H, tiles,
    LSTM: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, U: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = 4 if LSTM else 3
    programs = tl.num_programs(0)
    kind = y_ptr.dtype.element_ty
    for step in range(T):
        t = tl.cast(T - 1 - step if REVERSE else step, tl.int64)
        if step == 0:  # noqa: SIM108 -- Triton has no such expression for pointers
            h_ptr = h0_ptr
        else:
            h_ptr = y_ptr + (t + 1 if REVERSE else t - 1) * B * H
        for tile in range(tl.program_id(0), tiles, programs):
            unit, m, at, inside = _place(tile, B, H, BM, U)
            # The gates of a sequence lie H apart, its rows G H.
            gate_ptr = gates_ptr + t * B * G * H + at + m.to(tl.int64)[:, None] * ((G - 1) * H)
            sum0 = tl.load(gate_ptr, inside, 0.0).to(tl.float32)
            sum1 = tl.load(gate_ptr + H, inside, 0.0).to(tl.float32)
            sum2 = tl.load(gate_ptr + 2 * H, inside, 0.0).to(tl.float32)
            begin0, packed0 = _row(crow_ptr, unit, BI, BO)
            begin1, packed1 = _row(crow_ptr, H + unit, BI, BO)
            begin2, packed2 = _row(crow_ptr, 2 * H + unit, BI, BO)
            most = tl.maximum(packed0, tl.maximum(packed1, packed2))
            acc0 = tl.zeros((BM, U), dtype=tl.float32)
            acc1 = tl.zeros((BM, U), dtype=tl.float32)
            acc2 = tl.zeros((BM, U), dtype=tl.float32)
            if LSTM:
                sum3 = tl.load(gate_ptr + 3 * H, inside, 0.0).to(tl.float32)
                begin3, packed3 = _row(crow_ptr, 3 * H + unit, BI, BO)
                most = tl.maximum(most, packed3)
                acc3 = tl.zeros((BM, U), dtype=tl.float32)
            # All gates in one loop, so that their loads are under way together.
            for start in range(0, most, BK):
                acc0 = _add_product(
                    acc0, h_ptr, values_ptr, col_ptr, unit, begin0, packed0, start, m, B, H, BI, BO, U, BK,
                    PRECISION, WIDEN,
                )  # fmt: skip
                acc1 = _add_product(
                    acc1, h_ptr, values_ptr, col_ptr, H + unit, begin1, packed1, start, m, B, H, BI, BO, U, BK,
                    PRECISION, WIDEN,
                )  # fmt: skip
                acc2 = _add_product(
                    acc2, h_ptr, values_ptr, col_ptr, 2 * H + unit, begin2, packed2, start, m, B, H, BI, BO, U, BK,
                    PRECISION, WIDEN,
                )  # fmt: skip
                if LSTM:
                    acc3 = _add_product(
                        acc3, h_ptr, values_ptr, col_ptr, 3 * H + unit, begin3, packed3, start, m, B, H, BI, BO, U, BK,
                        PRECISION, WIDEN,
                    )  # fmt: skip
            if HAS_BIAS:
                n = bias_ptr + unit + tl.arange(0, U)
                acc0 += tl.load(n).to(tl.float32)[None, :]
                acc1 += tl.load(n + H).to(tl.float32)[None, :]
                acc2 += tl.load(n + 2 * H).to(tl.float32)[None, :]
                if LSTM:
                    acc3 += tl.load(n + 3 * H).to(tl.float32)[None, :]
            if KEEP:
                kept_ptr = saved_ptr + t * B * 4 * H + at + m.to(tl.int64)[:, None] * (3 * H)
            if LSTM:
                i = tl.sigmoid(sum0 + acc0)
                f = tl.sigmoid(sum1 + acc1)
                g = tanh(sum2 + acc2)
                o = tl.sigmoid(sum3 + acc3)
                c = tl.load(c_ptr + at, inside, 0.0)
                if KEEP:
                    tl.store(before_ptr + t * B * H + at, c, inside)
                c = f * c + i * g
                tl.store(c_ptr + at, c, inside)
                h = o * tanh(c)
                if KEEP:
                    tl.store(kept_ptr, i.to(kind), inside)
                    tl.store(kept_ptr + H, f.to(kind), inside)
                    tl.store(kept_ptr + 2 * H, g.to(kind), inside)
                    tl.store(kept_ptr + 3 * H, o.to(kind), inside)
            else:
                r = tl.sigmoid(sum0 + acc0)
                z = tl.sigmoid(sum1 + acc1)
                n_gate = tanh(sum2 + r * acc2)
                h = tl.load(h_ptr + at, inside, 0.0, cache_modifier=".cg").to(tl.float32)
                h = n_gate + z * (h - n_gate)
                if KEEP:
                    tl.store(kept_ptr, r.to(kind), inside)
                    tl.store(kept_ptr + H, z.to(kind), inside)
                    tl.store(kept_ptr + 2 * H, n_gate.to(kind), inside)
                    tl.store(kept_ptr + 3 * H, acc2.to(kind), inside)
            tl.store(y_ptr + t * B * H + at, h.to(kind), inside)
        if step < T - 1:
            _meet(counter_ptr, (step + 1) * programs)


@triton.jit
def _backward_kernel(
    dgates_ptr, dproduct_ptr, past_ptr, counter_ptr,  # [T, B, G H] twice (of an LSTM the same), [B, H], [1] zero
    dy_ptr, dh_ptr, saved_ptr, before_ptr,  # [T, B, H], [B, H], [T, B, 4 H], [T, B, H]
    values_ptr, t_crow_ptr, t_row_ptr, t_block_ptr,  # [Z, BI, BO], ...
    T, B, H, tiles,
    LSTM: tl.constexpr, REVERSE: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, U: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = 4 if LSTM else 3
    programs = tl.num_programs(0)
    kind = dgates_ptr.dtype.element_ty
    lane = tl.arange(0, BK)
    for step in range(T):
        t = tl.cast(step if REVERSE else T - 1 - step, tl.int64)
        for tile in range(tl.program_id(0), tiles, programs):
            unit, m, at, inside = _place(tile, B, H, BM, U)
            rows = m.to(tl.int64)[:, None]
            kept_ptr = saved_ptr + t * B * 4 * H + at + rows * (3 * H)
            dh = tl.load(dy_ptr + t * B * H + at, inside, 0.0).to(tl.float32)
            s0 = tl.load(kept_ptr, inside, 0.0).to(tl.float32)
            s1 = tl.load(kept_ptr + H, inside, 0.0).to(tl.float32)
            s2 = tl.load(kept_ptr + 2 * H, inside, 0.0).to(tl.float32)
            s3 = tl.load(kept_ptr + 3 * H, inside, 0.0).to(tl.float32)
            before = tl.load(before_ptr + t * B * H + at, inside, 0.0).to(tl.float32)
            past = tl.load(past_ptr + at, inside, 0.0)
            if step == 0:
                dh += tl.load(dh_ptr + at, inside, 0.0).to(tl.float32)
            else:
                # The step after this one: its gradients times the weights that its product read these units by.
                later_ptr = dproduct_ptr + (t - 1 if REVERSE else t + 1) * B * G * H
                begin = tl.load(t_crow_ptr + unit // BI)
                packed = (tl.load(t_crow_ptr + unit // BI + 1) - begin) * BO
                acc = tl.zeros((BM, U), dtype=tl.float32)
                for start in range(0, packed, BK):
                    at_k = start + lane
                    live = at_k < packed
                    block = tl.load(t_block_ptr + begin + at_k // BO, mask=live, other=0)
                    n = tl.load(t_row_ptr + begin + at_k // BO, mask=live, other=0) * BO + at_k % BO
                    d = tl.load(
                        later_ptr + rows * (G * H) + n[None, :],
                        mask=(m < B)[:, None] & (live & (n < G * H))[None, :], other=0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    panel = block.to(tl.int64)[None, :] * (BI * BO) + (at_k % BO)[None, :]
                    w_ptr = values_ptr + panel + (unit % BI + tl.arange(0, U))[:, None] * BO
                    w = tl.load(w_ptr, mask=live[None, :], other=0.0)  # [U, BK]
                    acc = dot(d, tl.trans(w), acc, PRECISION, WIDEN)
                dh += acc
            out = t * B * G * H + at + rows * ((G - 1) * H)
            if LSTM:
                squashed = tanh(s1 * before + s0 * s2)
                past += dh * s3 * (1.0 - squashed * squashed)
                tl.store(dgates_ptr + out, (past * s2 * s0 * (1.0 - s0)).to(kind), inside)
                tl.store(dgates_ptr + out + H, (past * before * s1 * (1.0 - s1)).to(kind), inside)
                tl.store(dgates_ptr + out + 2 * H, (past * s0 * (1.0 - s2 * s2)).to(kind), inside)
                tl.store(dgates_ptr + out + 3 * H, (dh * squashed * s3 * (1.0 - s3)).to(kind), inside)
                tl.store(past_ptr + at, past * s1, inside)
            else:
                dh += past
                dn = dh * (1.0 - s1) * (1.0 - s2 * s2)
                dz = dh * (before - s2) * s1 * (1.0 - s1)
                dr = dn * s3 * s0 * (1.0 - s0)
                tl.store(dgates_ptr + out, dr.to(kind), inside)
                tl.store(dgates_ptr + out + H, dz.to(kind), inside)
                tl.store(dgates_ptr + out + 2 * H, dn.to(kind), inside)
                tl.store(dproduct_ptr + out, dr.to(kind), inside)
                tl.store(dproduct_ptr + out + H, dz.to(kind), inside)
                tl.store(dproduct_ptr + out + 2 * H, (dn * s0).to(kind), inside)
                tl.store(past_ptr + at, dh * s1, inside)
        if step < T - 1:
            _meet(counter_ptr, (step + 1) * programs)


def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs one program after the other, so none may wait for another.
    return 1 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel, arguments, constants, batch: int, units: int, side: int, values: Tensor) -> None:
    """Launches as many programs as there are tiles, at most one for each multiprocessor."""
    programs, half = _multiprocessors(values.device), values.element_size() == 2
    high = min(64 if half else 32, max(16, next_power_of_2(batch)))
    # Wide tiles read the state less often, narrow ones employ more multiprocessors.
    fitting = [
        u for u in (64, 32, 16) if units % u == 0 and side % u == 0 and u <= (64 if high <= 32 else 32)
    ]
    wide = next((u for u in fitting if 4 * (units // u) * cdiv(batch, high) >= 3 * programs), fitting[-1])
    tiles = units // wide * cdiv(batch, high)
    _, block_in, block_out = values.shape
    # Packed columns a round: so many that few rounds wait for the L2 cache, as shared memory holds them.
    most = TILE_BYTES // ((high + wide) * values.element_size())
    step = min(256, 1 << most.bit_length() - 1)
    together = {} if INTERPRET else {"launch_cooperative_grid": True}
    launch(
        kernel, (min(tiles, programs), 1, 1), (*arguments, batch, units, tiles),
        (*constants, block_in, block_out, high, wide, step, *dot_options(values.dtype)),
        values.device,
        num_warps=8 if high * wide >= 1024 else 4, num_stages=3, **together,
    )  # fmt: skip


def forward(
    gates: Tensor,
    h0: Tensor,
    c: Tensor | None,
    values: Tensor,
    topo: Topology,
    bias: Tensor | None,
    steps: int,
    reverse: bool,
    y: Tensor,
    saved: Tensor | None,
    before: Tensor | None,
) -> None:
    """All steps of a layer in one direction.

    Args:
        gates: `(T B, G H)`, the input's half of the gates, contiguous.
        h0: `(B, H)`, contiguous.
        c: `(B, H)` float32, the cell state, replaced by that at the end; `None` for a GRU.
        values: `(Z, bi, bo)`, packed blocks of the `(G H, H)` weight, the dtype of `gates`.
        topo: Its indices.
        bias: `(G H,)` or `None`.
        steps: `T`.
        reverse: From the last step to the first.
        y: `(T B, H)`, written.
        saved: `(T B, 4 H)`, written for the way back, or `None`.
        before: `(T B, H)` float32, written for an LSTM's, or `None`.
    """
    batch, units = h0.shape
    counter = torch.zeros(1, dtype=torch.int32, device=values.device)
    _launch(
        _forward_kernel,
        (y, c, saved, before, counter, gates, h0, values, bias, topo.crow, topo.col, steps),
        (c is not None, reverse, saved is not None, bias is not None),
        batch, units, values.shape[2], values,
    )  # fmt: skip


def backward(
    dy: Tensor,
    dh: Tensor,
    past: Tensor,
    saved: Tensor,
    before: Tensor,
    values: Tensor,
    topo: Topology,
    steps: int,
    reverse: bool,
    lstm: bool,
    dgates: Tensor,
    dproduct: Tensor,
) -> None:
    """The way back through all steps but the product of the first with its state.

    Args:
        dy: `(T B, H)`, contiguous.
        dh: `(B, H)`, the gradient of the hidden state at the end.
        past: `(B, H)` float32, the gradient of the cell state at the end, replaced by that at the start; of a GRU
            zeros, replaced by what comes past the first step's product.
        saved: `(T B, 4 H)`, what `forward` wrote.
        before: `(T B, H)`, what `forward` wrote; of a GRU the hidden states that the steps took.
        values: `(Z, bi, bo)`.
        topo: Its indices.
        steps: `T`.
        reverse: As in `forward`.
        lstm: Whether it is an LSTM.
        dgates: `(T B, G H)`, written: the gradient of the input's half of the gates.
        dproduct: The same for the state's half, `dgates` itself for an LSTM.
    """
    batch, units = dh.shape
    counter = torch.zeros(1, dtype=torch.int32, device=values.device)
    _launch(
        _backward_kernel,
        (
            dgates, dproduct, past, counter, dy, dh, saved, before, values, topo.t_crow, topo.t_row, topo.t_block,
            steps,
        ),
        (lstm, reverse),
        batch, units, values.shape[1], values,
    )  # fmt: skip
