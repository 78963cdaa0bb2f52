"""`dx = dy W` with a block-sparse weight: the gradient of a linear layer's input.

The transposed product on the values as they lie: one program computes a tile of `BM` tokens by one block column and
walks that column's blocks through the transposed topology, `BK` output features a step.

    M tokens, K input features, N output features, Z stored blocks of (BI, BO), BK packed output features a step
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
from sparsify.kernels.triton_common import cdiv, dot, dot_options, token_tile


@triton.jit
def _dds_kernel(
    dx_ptr,  # [M, K]
    dy_ptr, values_ptr, t_crow_ptr, t_row_ptr, t_block_ptr,  # [M, N], [Z, BI, BO], [C + 1], [Z], [Z]
    M, N, K,
    stride_ym, stride_yn,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.arange(0, BI)
    lane = tl.arange(0, BK)
    begin = tl.load(t_crow_ptr + col)
    packed = (tl.load(t_crow_ptr + col + 1) - begin) * BO
    dy_offset = m.to(tl.int64)[:, None] * stride_ym
    w_offset = i[None, :] * BO
    acc = tl.zeros((BM, BI), dtype=tl.float32)
    for start in range(0, packed, BK):
        step = start + lane  # [BK] position in the column's packed output features
        inside = step < packed
        # An index for each lane, for the pipeline's sake: see triton_dsd.
        n = tl.load(t_row_ptr + begin + step // BO, mask=inside, other=0) * BO + step % BO
        block = tl.load(t_block_ptr + begin + step // BO, mask=inside, other=0).to(tl.int64)
        dy_mask = (m[:, None] < M) & (inside & (n < N))[None, :]
        dy = tl.load(
            dy_ptr + dy_offset + n.to(tl.int64)[None, :] * stride_yn, mask=dy_mask, other=0.0
        )  # [BM, BK]
        w_rows = (block * (BI * BO) + step % BO)[:, None]
        w = tl.load(values_ptr + w_rows + w_offset, mask=inside[:, None], other=0.0)  # [BK, BI]
        acc = dot(dy, w, acc, PRECISION, WIDEN)
    k = col * BI + i
    out = dx_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))


def dds(
    dy: Tensor,
    values: Tensor,
    topo: Topology,
    in_features: int,
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """`dx = dy W`; see `reference.dds` for shapes.

    `tile` tokens a program, `step` packed output features at a time, `warps` and pipeline `stages` are chosen by size
    where they are left out.
    """
    tokens, out_features = dy.shape
    _, block_in, block_out = values.shape
    dx = dy.new_empty(tokens, in_features)
    if tokens == 0:
        return dx
    cols, tile = topo.t_crow.numel() - 1, tile or token_tile(tokens)
    launch(
        _dds_kernel, (cdiv(tokens, tile), cols, 1),
        (
            dx,
            dy, values, topo.t_crow, topo.t_row, topo.t_block,
            tokens, out_features, in_features,
            dy.stride(0), dy.stride(1),
        ),
        (block_in, block_out, tile, step or max(32, min(block_out, 64)), *dot_options(dy.dtype)),
        dy.device,
        num_warps=warps or (8 if tile * block_in >= 128 * 128 else 4),
        num_stages=stages or (3 if dy.dtype != torch.float32 else 2),
    )  # fmt: skip
    return dx
