"""`dW = dy^T x` at the stored blocks only: the gradient of a block-sparse weight.

One program computes one tile of one stored block and sums over all tokens; blocks wider than `TILE` are cut into
tiles so that the accumulator fits the registers.

    M tokens, K input features, N output features, Z stored blocks of (BI, BO), TI x TO tile of a block
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.launch import launch
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import dot, dot_options

TILE = 128


@triton.jit
def _sdd_kernel(
    dw_ptr,  # [Z, BI, BO]
    dy_ptr, x_ptr, row_ptr, col_ptr,  # [M, N], [M, K], [Z], [Z]
    M, N, K,
    stride_ym, stride_yn, stride_xm, stride_xk,
    BI: tl.constexpr, BO: tl.constexpr, TI: tl.constexpr, TO: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tile = tl.program_id(1)
    i = tile // (BO // TO) * TI + tl.arange(0, TI)
    o = tile % (BO // TO) * TO + tl.arange(0, TO)
    k = tl.load(col_ptr + block) * BI + i
    n = tl.load(row_ptr + block) * BO + o
    acc = tl.zeros((TI, TO), dtype=tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        x_ptrs = x_ptr + m.to(tl.int64)[None, :] * stride_xm + k.to(tl.int64)[:, None] * stride_xk
        x = tl.load(x_ptrs, mask=(m[None, :] < M) & (k[:, None] < K), other=0.0)  # [TI, BM]
        dy_ptrs = dy_ptr + m.to(tl.int64)[:, None] * stride_ym + n.to(tl.int64)[None, :] * stride_yn
        dy = tl.load(dy_ptrs, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)  # [BM, TO]
        acc = dot(x, dy, acc, PRECISION, WIDEN)
    out = dw_ptr + block.to(tl.int64) * (BI * BO) + i[:, None] * BO + o[None, :]
    tl.store(out, acc.to(dw_ptr.dtype.element_ty))


def sdd(
    dy: Tensor,
    x: Tensor,
    topo: Topology,
    block_in: int,
    block_out: int,
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """`dW = dy^T x` at stored blocks; see `reference.sdd` for shapes.

    The longest side `tile` of a program's part of a block, `step` tokens at a time, `warps` and pipeline `stages` are
    chosen by size where they are left out.
    """
    blocks = topo.col.numel()
    dw = x.new_empty(blocks, block_in, block_out)
    if blocks == 0:
        return dw
    tile_in, tile_out = min(block_in, tile or TILE), min(block_out, tile or TILE)
    launch(
        _sdd_kernel, (blocks, (block_in // tile_in) * (block_out // tile_out), 1),
        (
            dw,
            dy, x, topo.row, topo.col,
            x.shape[0], dy.shape[1], x.shape[1],
            dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
        ),
        (block_in, block_out, tile_in, tile_out, step or 32, *dot_options(x.dtype)),
        x.device,
        num_warps=warps or (8 if tile_in * tile_out >= 128 * 128 else 4),
        num_stages=stages or (3 if x.dtype != torch.float32 else 2),
    )  # fmt: skip
    return dw
