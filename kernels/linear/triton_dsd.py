"""`y = activation(x W^T + bias) * multiply` with a block-sparse weight: forward of a linear layer, and what follows it.

One program computes a tile of `BM` tokens by one block row. It walks the row's contiguous K-major panel
`(nnz * BI, BO)` in steps of `BK` packed columns, whatever `BI` is, and gathers the activations' columns that those
belong to. An empty row writes the bias. Activation and factor are applied to the float32 sums.

    M tokens, K input features, N output features, Z stored blocks of (BI, BO), BK packed columns a step
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
from sparsify.kernels.triton_common import activate, cdiv, dot, dot_options, token_tile


@triton.jit
def _dsd_kernel(
    y_ptr,  # [M, N]
    x_ptr, values_ptr, bias_ptr, multiply_ptr, crow_ptr, col_ptr,  # [M, K], [Z, BI, BO], [N], [M, N], [R + 1], [Z]
    M, N, K,
    stride_xm, stride_xk,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_FACTOR: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = row * BO + tl.arange(0, BO)
    lane = tl.arange(0, BK)
    begin = tl.load(crow_ptr + row)
    packed = (tl.load(crow_ptr + row + 1) - begin) * BI
    panel_ptr = values_ptr + begin.to(tl.int64) * (BI * BO)
    w_offset = lane[:, None] * BO + tl.arange(0, BO)[None, :]
    x_offset = m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros((BM, BO), dtype=tl.float32)
    for start in range(0, packed, BK):
        step = start + lane  # [BK] position in the row's packed columns
        inside = step < packed
        # A column for each lane even where all lanes share a block: a scalar load here would not be pipelined, and
        # its latency in every step costs half the speed and more.
        k = tl.load(col_ptr + begin + step // BI, mask=inside, other=0) * BI + step % BI
        x_mask = (m[:, None] < M) & (inside & (k < K))[None, :]
        x = tl.load(
            x_ptr + x_offset + k.to(tl.int64)[None, :] * stride_xk, mask=x_mask, other=0.0
        )  # [BM, BK]
        w = tl.load(panel_ptr + start * BO + w_offset, mask=inside[:, None], other=0.0)  # [BK, BO]
        acc = dot(x, w, acc, PRECISION, WIDEN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    offset = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    if HAS_FACTOR:
        acc *= tl.load(multiply_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=mask)


def dsd(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topo: Topology,
    out_features: int,
    activation: str = "",
    multiply: Tensor | None = None,
    *,
    tile: int | None = None,
    step: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """`y = activation(x W^T + bias) * multiply`; see `reference.dsd` for shapes.

    `tile` tokens a program, `step` packed columns at a time, `warps` and pipeline `stages` are chosen by size where
    they are left out.
    """
    tokens, in_features = x.shape
    _, block_in, block_out = values.shape
    y = x.new_empty(tokens, out_features)
    if tokens == 0:
        return y
    rows, tile = topo.crow.numel() - 1, tile or token_tile(tokens)
    launch(
        _dsd_kernel, (cdiv(tokens, tile), rows, 1),
        (
            y,
            x, values, bias, multiply, topo.crow, topo.col,
            tokens, out_features, in_features,
            x.stride(0), x.stride(1),
        ),
        (
            bias is not None, activation, multiply is not None,
            block_in, block_out, tile, step or max(32, min(block_in, 64)), *dot_options(x.dtype),
        ),
        x.device,
        num_warps=warps or (8 if tile * block_out >= 128 * 128 else 4),
        num_stages=stages or (3 if x.dtype != torch.float32 else 2),
    )  # fmt: skip
    return y
