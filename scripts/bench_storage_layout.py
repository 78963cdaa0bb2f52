"""Two ways to store a block, `(bo, bi)` as in the dense weight or `(bi, bo)`, compared on a GPU before one was chosen.

One pointer-loading Triton kernel for each product, the same for both layouts but for two strides; the best of four tile
shapes each. bf16, 14336x4096, 75 % sparsity, uniformly random mask, correctness first, L2 flushed, medians, all
contestants interleaved. The command behind docs/decisions/0002-storage-layout.md:

    python scripts/bench_storage_layout.py --out docs/benchmarks/storage-layout-h200.json
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

N, K, SPARSITY = 14336, 4096, 0.75
BLOCKS = ((128, 128), (64, 64), (32, 32), (128, 16), (256, 16))
# Tokens a tile, contracted features a step, warps, stages.
MANY = ((128, 64, 8, 3), (128, 32, 4, 4), (64, 64, 4, 4), (256, 32, 8, 3))
FEW = ((16, 64, 4, 3), (16, 128, 4, 3), (16, 64, 8, 4), (16, 32, 2, 5))


@triton.jit
def _forward(
    y, x, values, crow, col, M, N, K, SK: tl.constexpr, SO: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`x W^T`; `SK` and `SO` are a block's strides along input and output features."""
    row = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.arange(0, BO)
    begin = tl.load(crow + row)
    packed = (tl.load(crow + row + 1) - begin) * BI
    acc = tl.zeros((BM, BO), tl.float32)
    for start in range(0, packed, BK):
        step = start + tl.arange(0, BK)
        inside = step < packed
        block = begin + step // BI
        k = tl.load(col + block, mask=inside, other=0) * BI + step % BI
        mask = (m < M)[:, None] & inside[None, :]
        tile = tl.load(x + m[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0)
        at = block.to(tl.int64) * (BI * BO) + (step % BI) * SK
        w = tl.load(values + at[:, None] + o[None, :] * SO, mask=inside[:, None], other=0.0)
        acc = tl.dot(tile, w, acc)
    out = y + m[:, None].to(tl.int64) * N + (row * BO + o)[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(m < M)[:, None])


@triton.jit
def _input_gradient(
    dx, dy, values, t_crow, t_row, t_block, M, N, K, SK: tl.constexpr, SO: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`dy W`, through the transposed order of the blocks."""
    column = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.arange(0, BI)
    begin = tl.load(t_crow + column)
    packed = (tl.load(t_crow + column + 1) - begin) * BO
    acc = tl.zeros((BM, BI), tl.float32)
    for start in range(0, packed, BK):
        o = start % BO + tl.arange(0, BK)
        row = tl.load(t_row + begin + start // BO)
        block = tl.load(t_block + begin + start // BO).to(tl.int64)
        n = row * BO + o
        tile = tl.load(dy + m[:, None].to(tl.int64) * N + n[None, :], mask=(m < M)[:, None], other=0.0)
        w = tl.load(values + block * (BI * BO) + o[:, None] * SO + i[None, :] * SK)
        acc = tl.dot(tile, w, acc)
    out = dx + m[:, None].to(tl.int64) * K + (column * BI + i)[None, :]
    tl.store(out, acc.to(dx.dtype.element_ty), mask=(m < M)[:, None])


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median microseconds of each call, taken in turns, the L2 cache flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(block: tuple[int, int], tokens: int) -> dict[str, object]:
    """Both layouts and dense, for one block shape and number of tokens; microseconds."""
    bo, bi = block
    rows, cols = N // bo, K // bi
    keep = torch.rand(rows, cols, device="cuda") >= SPARSITY
    crow = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    row, col = (index.int().contiguous() for index in keep.nonzero().unbind(1))
    order = torch.argsort(col, stable=True)
    t_crow = torch.nn.functional.pad(keep.sum(0).cumsum(0), (1, 0)).int()
    t_row, t_block = row[order].contiguous(), order.int()
    weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / 64
    masked = weight * keep.repeat_interleave(bo, 0).repeat_interleave(bi, 1)
    as_dense = weight.view(rows, bo, cols, bi).permute(0, 2, 1, 3)[keep].contiguous()
    layouts = {"bo,bi": (as_dense, 1, bi), "bi,bo": (as_dense.transpose(1, 2).contiguous(), bo, 1)}
    x = torch.randn(tokens, K, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(tokens, N, device="cuda", dtype=torch.bfloat16)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    contestants: dict[str, Callable[[], object]] = {
        "dense": lambda: x @ weight.T,
        "dense_dx": lambda: dy @ weight,
    }
    for layout, (values, sk, so) in layouts.items():
        for bm, bk, warps, stages in MANY if tokens > 16 else FEW:
            sizes = (tokens, N, K, sk, so, bi, bo, bm)
            packed_step, output_step = min(bk, bi) if bi >= 32 else bk, min(bk, bo)
            options = {"num_warps": warps, "num_stages": stages}

            def forward(values=values, sizes=sizes, bk=packed_step, bm=bm, options=options):
                grid = (triton.cdiv(tokens, bm), rows)
                _forward[grid](y, x, values, crow, col, *sizes, bk, **options)

            def gradient(values=values, sizes=sizes, bk=output_step, bm=bm, options=options):
                grid = (triton.cdiv(tokens, bm), cols)
                _input_gradient[grid](dx, dy, values, t_crow, t_row, t_block, *sizes, bk, **options)

            for name, call, out, exact in (
                ("fwd", forward, y, x @ masked.T),
                ("dx", gradient, dx, dy @ masked),
            ):
                out.fill_(float("nan"))
                call()
                if not (out.float() - exact.float()).norm() < 1e-2 * exact.float().norm():
                    sys.exit(f"error: {name} of {block} stored as ({layout}) is wrong; nothing is reported")
                contestants[f"{name} {layout} {bm},{bk},{warps},{stages}"] = call
    times = interleaved(contestants)
    best = {
        f"{name} {layout}": min(t for key, t in times.items() if key.startswith(f"{name} {layout} "))
        for name in ("fwd", "dx")
        for layout in layouts
    }
    dense = {"dense": times["dense"], "dense_dx": times["dense_dx"]}
    return {"block": f"{bo}x{bi}", "M": tokens, **dense, **best}


def main() -> None:
    """Measures every block shape and writes the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here; this benchmark measures GPU kernels")
    torch.manual_seed(0)
    rows = []
    for block in BLOCKS:
        for tokens in (4096, 16, 1):
            rows.append(compare(block, tokens))
            print(rows[-1], flush=True)
    arguments.out.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
