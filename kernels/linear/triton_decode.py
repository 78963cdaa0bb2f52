"""`y = act(x W^T + bias) * multiply` for few tokens: decoding, where the time is that of reading the blocks once.

A block row's panel is cut into chunks of packed columns; one program reads one chunk, so that enough bytes are in
flight to fill the memory bus, and the last program of a row to finish adds up the row's partial sums, in order:
results are the same from run to run. Rows are cut by their own length, so skewed masks stay balanced.

    M tokens (up to 32), K input features, N output features, stored blocks of (BI, BO), CHUNK packed columns a program
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.lasting import counters
from sparsify.kernels.launch import launch
from sparsify.kernels.storage import Topology
from sparsify.kernels.triton_common import activate, cdiv, dot, dot_options, next_power_of_2

MAX_TOKENS = 32


@triton.jit
def _decode_kernel(
    y_ptr, partial_ptr, arrived_ptr,  # [M, N], [R, CHUNKS, BM, BO] float32, [R] int32, zero before and after
    x_ptr, values_ptr, bias_ptr, crow_ptr, col_ptr,  # [M, K], [Z, BI, BO], [N], [R + 1], [Z]
    M, N, K, stride_xm, chunks,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ONE: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    begin = tl.load(crow_ptr + row)
    packed = (tl.load(crow_ptr + row + 1) - begin) * BI
    active = tl.maximum(1, tl.cdiv(packed, CHUNK))
    if chunk >= active:
        return
    m = tl.arange(0, BM)
    o = tl.arange(0, BO)
    lane = tl.arange(0, BK)
    panel_ptr = values_ptr + begin.to(tl.int64) * (BI * BO)
    end = tl.minimum(packed, (chunk + 1) * CHUNK)
    if ONE:  # one token: multiply and add by element, and sum over the columns once at the end
        wide = tl.zeros((BK, BO), dtype=tl.float32)
    acc = tl.zeros((BM, BO), dtype=tl.float32)
    for start in range(chunk * CHUNK, end, BK):
        step = start + lane
        inside = step < end
        k = tl.load(col_ptr + begin + step // BI, mask=inside, other=0) * BI + step % BI
        inside_x = inside & (k < K)
        w = tl.load(panel_ptr + step[:, None] * BO + o[None, :], mask=inside[:, None], other=0.0)  # [BK, BO]
        if ONE:
            x = tl.load(x_ptr + k, mask=inside_x, other=0.0).to(tl.float32)
            wide += x[:, None] * w.to(tl.float32)
        else:
            x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k[None, :]
            x = tl.load(x_ptrs, mask=(m[:, None] < M) & inside_x[None, :], other=0.0)  # [BM, BK]
            acc = dot(x, w, acc, PRECISION, WIDEN)
    if ONE:
        acc += tl.sum(wide, 0)[None, :]
    n = row * BO + o
    tile = m[:, None] * BO + o[None, :]
    last = active == 1
    if active > 1:
        partials = partial_ptr + row.to(tl.int64) * chunks * (BM * BO)
        tl.store(partials + chunk * (BM * BO) + tile, acc)
        tl.debug_barrier()  # all threads have stored before one of them reports it
        last = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == active - 1
        if last:
            acc = tl.zeros((BM, BO), dtype=tl.float32)
            for other in range(active):
                acc += tl.load(partials + other * (BM * BO) + tile, cache_modifier=".cg")
            tl.store(arrived_ptr + row, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION)
        out = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def dsd(
    x: Tensor, values: Tensor, bias: Tensor | None, topo: Topology, out_features: int, activation: str = "",
    multiply: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`y = act(x W^T + bias) * multiply` for 1 to `MAX_TOKENS` tokens; see `reference.dsd`. Unit column stride."""
    tokens, in_features = x.shape
    _, block_in, block_out = values.shape
    y = x.new_empty(tokens, out_features)
    rows, cols = topo.crow.numel() - 1, topo.t_crow.numel() - 1
    # Measured on an H200: one load of the whole chunk is best, except for tall blocks of several tokens.
    if tokens == 1:
        chunk = min(512, max(64, 16384 // block_out))
    elif block_out <= 64:
        chunk = min(256, 8192 // block_out)
    else:
        chunk = 512 if rows <= 64 else 256
    step = chunk if tokens == 1 or block_out <= 64 else 64 if block_out <= 128 else 32
    chunks = cdiv(cols * block_in, chunk)
    tile = 1 if tokens == 1 else max(16, next_power_of_2(tokens))
    partial = torch.empty(rows * chunks * tile * block_out, dtype=torch.float32, device=x.device)
    launch(
        _decode_kernel, (rows, chunks, 1),
        (
            y, partial, counters(x.device, rows),
            x, values, bias, topo.crow, topo.col,
            tokens, out_features, in_features, x.stride(0), chunks,
        ),
        (bias is not None, activation, tokens == 1, block_in, block_out, tile, step, chunk, *dot_options(x.dtype)),
        x.device,
        num_warps=8 if tokens > 1 and block_out <= 64 else 4, num_stages=3,
    )  # fmt: skip
    return y if multiply is None else y.mul_(multiply)
