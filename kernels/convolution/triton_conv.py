"""Convolutions with a block-sparse weight as implicit matrix products: no buffer of gathered patches exists.

An output pixel at kernel position `(ky, kx)` reads the input pixel `(oy * stride - top + ky * dilation, ...)`, whose
address is one term of the pixel plus one of position and channel. So the products are those of the linear layer
(`triton_dsd`, `triton_dds`, `triton_sdd`) with other addresses, and a mask where a position looks over the edge:

    conv      y[m, n]  = sum over the stored blocks of n's row of     x[m at position p, channels] W
    conv_dx   dx[m, c] = sum over the stored blocks of c's column of  dy[m at position p, features] W^T
    conv_dw   dW[z]    = sum over output pixels of                    x[m at position p, channels]^T dy[m, features]

Which positions of a pixel lie inside is worked out once and kept as one bit each, where there are at most 31.

    B batch, H x W pixels in, OH x OW pixels out, M of them in all images, IG and OG channels of a group in and out,
    Z stored blocks of (BI, BO), R x C blocks of a group at one of P = KH * KW positions, GR block rows of all groups
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.convolution.geometry import Geometry
from sparsify.kernels.launch import launch
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import cdiv, dot, dot_options, token_tile

# Kernel positions that fit the bits of one number.
MOST_BITS = 31
# Programs that fill a large GPU; the weight's gradient cuts the pixels into parts until there are as many.
PROGRAMS = 1024
TILE = 128


@triton.jit
def _conv_kernel(
    y_ptr,  # [B, OH, OW, channels], contiguous
    x_ptr, values_ptr, bias_ptr, crow_ptr, col_ptr,  # [B, H, W, I], [Z, BI, BO], [O], [GR + 1], [Z]
    M, H, W, OH, OW, channels, IG, OG, R, C,
    stride_b, stride_h, stride_w, stride_c,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    rows = tl.cdiv(channels, OG) * R
    row = tl.program_id(0) % rows  # neighbours share their pixels
    m = tl.program_id(0).to(tl.int64) // rows * BM + tl.arange(0, BM)
    group = row // R
    o = row % R * BO + tl.arange(0, BO)
    lane = tl.arange(0, BK)
    pixel = (m % (OH * OW)).to(tl.int32)
    y0 = pixel // OW * SH - TOP  # [BM] input pixel of position (0, 0)
    x0 = pixel % OW * SW - LEFT
    x_offset = m // (OH * OW) * stride_b + y0.to(tl.int64) * stride_h + x0.to(tl.int64) * stride_w
    inside_m = m < M
    if BITS:
        bits = tl.zeros((BM,), dtype=tl.int32)
        for bit in tl.static_range(KH * KW):
            at_y = y0 + bit // KW * DH
            at_x = x0 + bit % KW * DW
            valid = inside_m & (at_y >= 0) & (at_y < H) & (at_x >= 0) & (at_x < W)
            bits |= valid.to(tl.int32) << bit
    begin = tl.load(crow_ptr + row)
    packed = (tl.load(crow_ptr + row + 1) - begin) * BI
    panel_ptr = values_ptr + begin.to(tl.int64) * (BI * BO)
    w_offset = lane[:, None] * BO + tl.arange(0, BO)[None, :]
    acc = tl.zeros((BM, BO), dtype=tl.float32)
    for start in range(0, packed, BK):
        step = start + lane  # [BK] position in the row's packed columns
        inside = step < packed
        # An index for each lane, for the pipeline's sake: see triton_dsd.
        col = tl.load(col_ptr + begin + step // BI, mask=inside, other=0)
        p = col // C
        channel = col % C * BI + step % BI
        ky = p // KW * DH
        kx = p % KW * DW
        x_column = ky.to(tl.int64) * stride_h + kx.to(tl.int64) * stride_w
        x_column += (group * IG + channel).to(tl.int64) * stride_c
        inside_k = inside & (channel < IG)
        if BITS:
            x_mask = ((bits[:, None] >> p[None, :]) & 1 != 0) & inside_k[None, :]
        else:
            iy = y0[:, None] + ky[None, :]
            ix = x0[:, None] + kx[None, :]
            x_mask = (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W) & inside_m[:, None] & inside_k[None, :]
        x = tl.load(x_ptr + x_offset[:, None] + x_column[None, :], mask=x_mask, other=0.0)  # [BM, BK]
        w = tl.load(panel_ptr + start * BO + w_offset, mask=inside[:, None], other=0.0)  # [BK, BO]
        acc = dot(x, w, acc, PRECISION, WIDEN)
    n = group * OG + o
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=o < OG, other=0.0).to(tl.float32)[None, :]
    out = y_ptr + m[:, None] * channels + n[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & (o < OG)[None, :])


@triton.jit
def _dx_kernel(
    dx_ptr,  # [B, H, W, channels], contiguous
    dy_ptr, values_ptr, t_crow_ptr, t_row_ptr, t_block_ptr,  # [B, OH, OW, O], [Z, BI, BO], [.. + 1], [Z], [Z]
    B, H, W, OH, OW, channels, IG, OG, R, C, GR,
    stride_b, stride_h, stride_w, stride_c,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    BITS: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # A list of blocks is that of one channel block in one phase, whose pixels form an image of their own.
    lists = tl.cdiv(channels, IG) * C * (SH * SW)
    part = tl.program_id(0) % lists
    m = tl.program_id(0).to(tl.int64) // lists * BM + tl.arange(0, BM)
    column = part // (SH * SW)
    group = column // C
    i = column % C * BI + tl.arange(0, BI)
    phase_y = part % (SH * SW) // SW
    phase_x = part % SW
    own_h = (H - phase_y + SH - 1) // SH
    own_w = tl.maximum((W - phase_x + SW - 1) // SW, 1)  # an image smaller than its stride has empty phases
    area = tl.maximum(own_h, 1) * own_w
    pixel = (m % area).to(tl.int32)
    y = pixel // own_w
    x = pixel % own_w
    inside_m = (m < B * area) & (y < own_h) & (x * SW + phase_x < W)
    lane = tl.arange(0, BK)
    dy_offset = m // area * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    if BITS:
        bits = tl.zeros((BM,), dtype=tl.int32)
        for bit in tl.static_range(KH * KW):
            # Rounded down by a sum that is never negative; positions of other phases are in other lists.
            at_y = y + (phase_y + TOP - bit // KW * DH + SH * KH * DH) // SH - KH * DH
            at_x = x + (phase_x + LEFT - bit % KW * DW + SW * KW * DW) // SW - KW * DW
            valid = inside_m & (at_y >= 0) & (at_y < OH) & (at_x >= 0) & (at_x < OW)
            bits |= valid.to(tl.int32) << bit
    begin = tl.load(t_crow_ptr + part)
    packed = (tl.load(t_crow_ptr + part + 1) - begin) * BO
    w_offset = tl.arange(0, BI)[None, :] * BO
    acc = tl.zeros((BM, BI), dtype=tl.float32)
    for start in range(0, packed, BK):
        step = start + lane  # [BK] position in the list's packed output features
        inside = step < packed
        t_row = tl.load(t_row_ptr + begin + step // BO, mask=inside, other=0)
        block = tl.load(t_block_ptr + begin + step // BO, mask=inside, other=0).to(tl.int64)
        p = t_row // GR
        feature = t_row % GR % R * BO + step % BO
        shift_y = (phase_y + TOP - p // KW * DH + SH * KH * DH) // SH - KH * DH
        shift_x = (phase_x + LEFT - p % KW * DW + SW * KW * DW) // SW - KW * DW
        dy_column = shift_y.to(tl.int64) * stride_h + shift_x.to(tl.int64) * stride_w
        dy_column += (group * OG + feature).to(tl.int64) * stride_c
        inside_k = inside & (feature < OG)
        if BITS:
            dy_mask = ((bits[:, None] >> p[None, :]) & 1 != 0) & inside_k[None, :]
        else:
            oy = y[:, None] + shift_y[None, :]
            ox = x[:, None] + shift_x[None, :]
            dy_mask = (oy >= 0) & (oy < OH) & (ox >= 0) & (ox < OW) & inside_m[:, None] & inside_k[None, :]
        dy = tl.load(dy_ptr + dy_offset[:, None] + dy_column[None, :], mask=dy_mask, other=0.0)  # [BM, BK]
        w_rows = (block * (BI * BO) + step % BO)[:, None]
        w = tl.load(values_ptr + w_rows + w_offset, mask=inside[:, None], other=0.0)  # [BK, BI]
        acc = dot(dy, w, acc, PRECISION, WIDEN)
    at = (m // area * H + (y * SH + phase_y)) * W + (x * SW + phase_x)
    out = dx_ptr + at[:, None] * channels + (group * IG + i)[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=inside_m[:, None] & (i < IG)[None, :])


@triton.jit
def _dw_kernel(
    dw_ptr,  # [parts, Z, BI, BO], float32 if there are several parts
    dy_ptr, x_ptr, row_ptr, col_ptr,  # [B, OH, OW, O], [B, H, W, I], [Z], [Z]
    M, H, W, OH, OW, Z, IG, OG, R, C, share,
    stride_yb, stride_yh, stride_yw, stride_yc, stride_b, stride_h, stride_w, stride_c,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, TI: tl.constexpr, TO: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    part = tl.program_id(1)
    tile = tl.program_id(2)
    i = tile // (BO // TO) * TI + tl.arange(0, TI)
    o = tile % (BO // TO) * TO + tl.arange(0, TO)
    col = tl.load(col_ptr + block)
    row = tl.load(row_ptr + block)
    group = row // R
    p = col // C
    channel = col % C * BI + i
    feature = row % R * BO + o
    ky = p // KW * DH - TOP
    kx = p % KW * DW - LEFT
    x_column = (group * IG + channel).to(tl.int64)[None, :] * stride_c
    dy_column = (group * OG + feature).to(tl.int64)[None, :] * stride_yc
    end = tl.minimum(M, (part + 1) * share)
    acc = tl.zeros((TI, TO), dtype=tl.float32)
    for start in range(part * share, end, BM):
        m = start + tl.arange(0, BM)
        inside = m < end
        ox = m % OW
        oy = m // OW % OH
        batch = (m // OW // OH).to(tl.int64)
        iy = oy * SH + ky
        ix = ox * SW + kx
        x_offset = batch * stride_b + iy.to(tl.int64) * stride_h + ix.to(tl.int64) * stride_w
        valid = inside & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        x_mask = valid[:, None] & (channel < IG)[None, :]
        x = tl.load(x_ptr + x_offset[:, None] + x_column, mask=x_mask, other=0.0)  # [BM, TI]
        dy_offset = batch * stride_yb + oy.to(tl.int64) * stride_yh + ox.to(tl.int64) * stride_yw
        dy_mask = inside[:, None] & (feature < OG)[None, :]
        dy = tl.load(dy_ptr + dy_offset[:, None] + dy_column, mask=dy_mask, other=0.0)  # [BM, TO]
        acc = dot(tl.trans(x), dy, acc, PRECISION, WIDEN)
    out = dw_ptr + (part.to(tl.int64) * Z + block) * (BI * BO) + i[:, None] * BO + o[None, :]
    tl.store(out, acc.to(dw_ptr.dtype.element_ty))


def _tile(pixels: int, side: int, dtype: torch.dtype) -> int:
    """Pixels per program; fewer where float32 sums of large blocks would not fit the registers."""
    return min(token_tile(pixels), 64 if dtype == torch.float32 and side > 128 else 128)


def _warps(height: int, width: int) -> int:
    return 8 if height * width >= 128 * 128 else 4


def _stages(dtype: torch.dtype) -> int:
    return 3 if dtype != torch.float32 else 2


def _windows(geometry: Geometry) -> tuple[int, ...]:
    return (
        geometry.stride_h, geometry.stride_w, geometry.top, geometry.left,
        geometry.dilation_h, geometry.dilation_w,
    )  # fmt: skip


def conv(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topo: Topology,
    geometry: Sequence[int],
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """The convolution; see `reference.conv` for shapes.

    `tile` output pixels a program, `step` packed columns at a time, `warps` and pipeline `stages` are chosen by size
    where they are left out.
    """
    geometry = Geometry(*geometry)
    batch, height, width, _ = x.shape
    _, block_in, block_out = values.shape
    out_height, out_width = geometry.out_size(height, width)
    y = x.new_empty(batch, out_height, out_width, geometry.out_channels)
    pixels = batch * out_height * out_width
    if pixels == 0:
        return y
    rows, cols = geometry.grid(block_in, block_out)
    tile = tile or _tile(pixels, block_out, x.dtype)
    launch(
        _conv_kernel, (geometry.groups * rows * cdiv(pixels, tile), 1, 1),
        (
            y,
            x, values, bias, topo.crow, topo.col,
            pixels, height, width, out_height, out_width, geometry.out_channels,
            geometry.group_in, geometry.group_out, rows, cols,
            *x.stride(),
        ),
        (
            geometry.kernel_h, geometry.kernel_w, *_windows(geometry),
            bias is not None, geometry.positions <= MOST_BITS, block_in, block_out, tile,
            step or max(32, min(block_in, 64)), *dot_options(x.dtype),
        ),
        x.device,
        num_warps=warps or _warps(tile, block_out),
        num_stages=stages or _stages(x.dtype),
    )  # fmt: skip
    return y


def conv_dx(
    dy: Tensor,
    values: Tensor,
    topo: Topology,
    geometry: Sequence[int],
    height: int,
    width: int,
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """Gradient of the input; see `reference.conv_dx` for shapes, and `conv` for the options."""
    geometry = Geometry(*geometry)
    batch, out_height, out_width, _ = dy.shape
    _, block_in, block_out = values.shape
    dx = dy.new_empty(batch, height, width, geometry.in_channels)
    if dx.numel() == 0:
        return dx
    rows, cols = geometry.grid(block_in, block_out)
    pixels = batch * cdiv(height, geometry.stride_h) * cdiv(width, geometry.stride_w)  # of the largest phase
    tile = tile or _tile(pixels, block_in, dy.dtype)
    launch(
        _dx_kernel, (geometry.groups * cols * geometry.phases * cdiv(pixels, tile), 1, 1),
        (
            dx,
            dy, values, topo.t_crow, topo.t_row, topo.t_block,
            batch, height, width, out_height, out_width, geometry.in_channels,
            geometry.group_in, geometry.group_out, rows, cols, geometry.groups * rows,
            *dy.stride(),
        ),
        (
            geometry.kernel_h, geometry.kernel_w, *_windows(geometry),
            geometry.positions <= MOST_BITS, block_in, block_out, tile,
            step or max(32, min(block_out, 64)), *dot_options(dy.dtype),
        ),
        dy.device,
        num_warps=warps or _warps(tile, block_in),
        num_stages=stages or _stages(dy.dtype),
    )  # fmt: skip
    return dx


def conv_dw(
    dy: Tensor,
    x: Tensor,
    topo: Topology,
    geometry: Sequence[int],
    block_in: int,
    block_out: int,
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
    parts: int | None = None,
) -> Tensor:
    """Gradient of the weight at its stored blocks; see `reference.conv_dw` for shapes.

    Where there are few blocks the pixels are cut into `parts`, whose sums are added up in order: results are the same
    from run to run. `tile` is the longest side of a program's part of a block, `step` are pixels at a time.
    """
    geometry = Geometry(*geometry)
    batch, out_height, out_width, _ = dy.shape
    blocks, pixels = topo.col.numel(), batch * out_height * out_width
    if blocks == 0 or pixels == 0:
        return x.new_zeros(blocks, block_in, block_out)
    rows, cols = geometry.grid(block_in, block_out)
    tile_in, tile_out, step = min(block_in, tile or TILE), min(block_out, tile or TILE), step or 64
    tiles = (block_in // tile_in) * (block_out // tile_out)
    parts = parts or max(1, min(PROGRAMS // (blocks * tiles), pixels // (16 * step)))
    share = cdiv(cdiv(pixels, parts), step) * step
    parts = cdiv(pixels, share)
    dw = x.new_empty(parts, blocks, block_in, block_out, dtype=torch.float32 if parts > 1 else x.dtype)
    launch(
        _dw_kernel, (blocks, parts, tiles),
        (
            dw,
            dy, x, topo.row, topo.col,
            pixels, x.shape[1], x.shape[2], out_height, out_width, blocks,
            geometry.group_in, geometry.group_out, rows, cols, share,
            *dy.stride(), *x.stride(),
        ),
        (
            geometry.kernel_w, *_windows(geometry),
            block_in, block_out, tile_in, tile_out, step, *dot_options(x.dtype),
        ),
        x.device,
        num_warps=warps or _warps(tile_in, tile_out),
        num_stages=stages or _stages(x.dtype),
    )  # fmt: skip
    return dw[0] if parts == 1 else dw.sum(0).to(x.dtype)
