"""One time step of an LSTM or GRU apart from its matrix product, as one Triton kernel each: see `cells`.

One program computes a stretch of hidden units of one sequence; all sums are float32.

    b sequences, H hidden units; gates lie one after the other in a row, `H` apart
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.launch import launch
from sparsify.kernels.triton_common import cdiv, next_power_of_2

WIDEST = 512


@triton.jit
def tanh(x):
    """Of float32 values, with the sign taken out so that nothing overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _units(H, WIDTH: tl.constexpr):
    """Row of the program, its hidden units, and which of them exist."""
    unit = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    return tl.program_id(0).to(tl.int64), unit, unit < H


@triton.jit
def _sum(gates_ptr, product_ptr, at, inside):
    """Both halves of a gate, in float32."""
    product = tl.load(product_ptr + at, inside, 0.0).to(tl.float32)
    return tl.load(gates_ptr + at, inside, 0.0).to(tl.float32) + product


@triton.jit
def _lstm_kernel(
    h_ptr, c_ptr, saved_ptr, before_ptr,  # [b, H], [b, H], [b, 4 H], [b, H]
    gates_ptr, product_ptr,  # [b, 4 H], [b, 4 H]
    H,
    KEEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, unit, inside = _units(H, WIDTH)
    at = row * 4 * H + unit
    i = _sum(gates_ptr, product_ptr, at, inside)
    f = _sum(gates_ptr, product_ptr, at + H, inside)
    g = _sum(gates_ptr, product_ptr, at + 2 * H, inside)
    o = _sum(gates_ptr, product_ptr, at + 3 * H, inside)
    i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), tanh(g), tl.sigmoid(o)
    own = row * H + unit
    c = tl.load(c_ptr + own, inside, 0.0)
    if KEEP:
        kind = saved_ptr.dtype.element_ty
        tl.store(saved_ptr + at, i.to(kind), inside)
        tl.store(saved_ptr + at + H, f.to(kind), inside)
        tl.store(saved_ptr + at + 2 * H, g.to(kind), inside)
        tl.store(saved_ptr + at + 3 * H, o.to(kind), inside)
        tl.store(before_ptr + own, c, inside)
    c = f * c + i * g
    tl.store(c_ptr + own, c, inside)
    tl.store(h_ptr + own, (o * tanh(c)).to(h_ptr.dtype.element_ty), inside)


@triton.jit
def _lstm_back_kernel(
    dgates_ptr, dc_ptr,  # [b, 4 H], [b, H]
    dy_ptr, dh_ptr, saved_ptr, before_ptr,  # [b, H], [b, H], [b, 4 H], [b, H]
    H,
    HAS_DY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, unit, inside = _units(H, WIDTH)
    at, own = row * 4 * H + unit, row * H + unit
    i = tl.load(saved_ptr + at, inside, 0.0).to(tl.float32)
    f = tl.load(saved_ptr + at + H, inside, 0.0).to(tl.float32)
    g = tl.load(saved_ptr + at + 2 * H, inside, 0.0).to(tl.float32)
    o = tl.load(saved_ptr + at + 3 * H, inside, 0.0).to(tl.float32)
    before = tl.load(before_ptr + own, inside, 0.0)
    dh = tl.load(dh_ptr + own, inside, 0.0).to(tl.float32)
    if HAS_DY:
        dh += tl.load(dy_ptr + own, inside, 0.0)
    t = tanh(f * before + i * g)
    dc = tl.load(dc_ptr + own, inside, 0.0) + dh * o * (1.0 - t * t)
    kind = dgates_ptr.dtype.element_ty
    tl.store(dgates_ptr + at, (dc * g * i * (1.0 - i)).to(kind), inside)
    tl.store(dgates_ptr + at + H, (dc * before * f * (1.0 - f)).to(kind), inside)
    tl.store(dgates_ptr + at + 2 * H, (dc * i * (1.0 - g * g)).to(kind), inside)
    tl.store(dgates_ptr + at + 3 * H, (dh * t * o * (1.0 - o)).to(kind), inside)
    tl.store(dc_ptr + own, dc * f, inside)


@triton.jit
def _gru_kernel(
    h_ptr, saved_ptr,  # [b, H], [b, 4 H]
    gates_ptr, product_ptr, h_before_ptr,  # [b, 3 H], [b, 3 H], [b, H]
    H,
    KEEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, unit, inside = _units(H, WIDTH)
    at, own = row * 3 * H + unit, row * H + unit
    r = _sum(gates_ptr, product_ptr, at, inside)
    z = _sum(gates_ptr, product_ptr, at + H, inside)
    m = tl.load(product_ptr + at + 2 * H, inside, 0.0).to(tl.float32)
    r, z = tl.sigmoid(r), tl.sigmoid(z)
    n = tanh(tl.load(gates_ptr + at + 2 * H, inside, 0.0).to(tl.float32) + r * m)
    if KEEP:
        kind = saved_ptr.dtype.element_ty
        kept = saved_ptr + row * 4 * H + unit
        tl.store(kept, r.to(kind), inside)
        tl.store(kept + H, z.to(kind), inside)
        tl.store(kept + 2 * H, n.to(kind), inside)
        tl.store(kept + 3 * H, m.to(kind), inside)
    h = tl.load(h_before_ptr + own, inside, 0.0).to(tl.float32)
    tl.store(h_ptr + own, (n + z * (h - n)).to(h_ptr.dtype.element_ty), inside)


@triton.jit
def _gru_back_kernel(
    dgates_ptr, dproduct_ptr, carry_ptr,  # [b, 3 H], [b, 3 H], [b, H]
    dy_ptr, dh_ptr, saved_ptr, h_before_ptr,  # [b, H], [b, H], [b, 4 H], [b, H]
    H,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row, unit, inside = _units(H, WIDTH)
    at, own, kept = row * 3 * H + unit, row * H + unit, saved_ptr + row * 4 * H + unit
    r = tl.load(kept, inside, 0.0).to(tl.float32)
    z = tl.load(kept + H, inside, 0.0).to(tl.float32)
    n = tl.load(kept + 2 * H, inside, 0.0).to(tl.float32)
    m = tl.load(kept + 3 * H, inside, 0.0).to(tl.float32)
    h = tl.load(h_before_ptr + own, inside, 0.0).to(tl.float32)
    dh = tl.load(carry_ptr + own, inside, 0.0) + tl.load(dh_ptr + own, inside, 0.0)
    dh += tl.load(dy_ptr + own, inside, 0.0)
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dz = dh * (h - n) * z * (1.0 - z)
    dr = dn * m * r * (1.0 - r)
    kind = dgates_ptr.dtype.element_ty
    tl.store(dgates_ptr + at, dr.to(kind), inside)
    tl.store(dgates_ptr + at + H, dz.to(kind), inside)
    tl.store(dgates_ptr + at + 2 * H, dn.to(kind), inside)
    tl.store(dproduct_ptr + at, dr.to(kind), inside)
    tl.store(dproduct_ptr + at + H, dz.to(kind), inside)
    tl.store(dproduct_ptr + at + 2 * H, (dn * r).to(kind), inside)
    tl.store(carry_ptr + own, dh * z, inside)


def _run(kernel, rows: int, units: int, arguments: tuple[Tensor | None, ...], *constants: bool) -> None:
    width = min(WIDEST, next_power_of_2(units))
    place = arguments[0].device  # pyright: ignore[reportOptionalMemberAccess]
    launch(
        kernel, (rows, cdiv(units, width), 1), (*arguments, units), (*constants, width), place, num_warps=4
    )


def lstm(
    gates: Tensor, product: Tensor, c: Tensor, h: Tensor, saved: Tensor | None, before: Tensor | None
) -> None:
    """See `cells.lstm`; all tensors contiguous."""
    _run(_lstm_kernel, *h.shape, (h, c, saved, before, gates, product), saved is not None)


def lstm_back(
    dy: Tensor | None, dh: Tensor, dc: Tensor, saved: Tensor, before: Tensor, dgates: Tensor
) -> None:
    """See `cells.lstm_back`; all tensors contiguous."""
    _run(_lstm_back_kernel, *dc.shape, (dgates, dc, dy, dh, saved, before), dy is not None)


def gru(gates: Tensor, product: Tensor, h_before: Tensor, h: Tensor, saved: Tensor | None) -> None:
    """See `cells.gru`; all tensors contiguous."""
    _run(_gru_kernel, *h.shape, (h, saved, gates, product, h_before), saved is not None)


def gru_back(
    dy: Tensor, dh: Tensor, carry: Tensor, saved: Tensor, h_before: Tensor, dgates: Tensor, dproduct: Tensor
) -> None:
    """See `cells.gru_back`; all tensors contiguous."""
    _run(_gru_back_kernel, *carry.shape, (dgates, dproduct, carry, dy, dh, saved, h_before))
