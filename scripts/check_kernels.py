"""Runs every kernel that this GPU has, once, on small products: for NVIDIA's compute-sanitizer.

    python scripts/check_kernels.py                      # compiles, which later runs then need not
    for tool in memcheck racecheck synccheck initcheck; do
        compute-sanitizer --tool $tool --error-exitcode 3 python scripts/check_kernels.py
    done

Memory is not cached, so that the sanitizer sees every allocation by itself. Persistent kernels get few programs, so
that each does several tiles one after the other as it would at real sizes. Results are compared with the reference on
the CPU; the exit code is 1 if one is wrong. `--only NAME` runs the kernels whose name contains it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify import BlockMask, BlockShape
from sparsify.kernels import dispatch
from sparsify.kernels.linear import reference
from sparsify.kernels.storage import Topology, pack, topology

PROGRAMS = 2
# Shapes of blocks by the kernels that take them, and tokens for those of decoding and the others.
BLOCKS = ((64, 64), (128, 128), (128, 16), (32, 32))
TOKENS = (3, 300)
DTYPES = (torch.bfloat16, torch.float32)


class Product(NamedTuple):
    """One product: its arguments, and those by which `dispatch` lists the kernels that take it."""

    op: str
    operands: tuple[Any, ...]
    arguments: tuple[Any, ...]
    label: str


def weight(shape: tuple[int, int], block: BlockShape, dtype: torch.dtype) -> tuple[Tensor, Topology]:
    """A random weight with two thirds of its blocks, an empty and a full row; values and indices."""
    keep = torch.rand(block.grid(shape)) < 0.67
    keep[0], keep[-1] = False, True
    mask = BlockMask(keep, shape, block)
    crow, col = mask.csr()
    values = pack(torch.randn(shape).to(dtype) / shape[1] ** 0.5, mask)
    return values, topology(crow, col, block.grid(shape)[1])


def products(device: str) -> Iterator[Product]:
    """Every product, with padding on both sides of the weight and a last tile that is not full."""
    for block in map(BlockShape.parse, BLOCKS):
        shape = 3 * block.rows + 8, max(9 * block.cols, 320) + 8
        for dtype in DTYPES if block == BlockShape(32, 32) else DTYPES[:1]:
            (values, topo), (other, other_topo) = (weight(shape, block, dtype) for _ in range(2))
            values, other = values.to(device), other.to(device)
            topo, other_topo = (Topology(*(t.to(device) for t in each)) for each in (topo, other_topo))
            bias = torch.randn(shape[0]).to(device, dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1]).to(device, dtype)
                dy = torch.randn(tokens, shape[0]).to(device, dtype)
                sides = block.cols, block.rows
                label = f"{tokens} tokens, {block} blocks, {str(dtype).removeprefix('torch.')}"
                forward = (x, values, bias, topo, shape[0])
                yield Product("dsd", (x, values, sides, shape[0]), forward, label)
                yield Product("dds", (dy, values, sides, shape[1]), (dy, values, topo, shape[1]), label)
                yield Product("sdd", (dy, x, sides, topo.col.numel()), (dy, x, topo, *sides), label)
                gated = (x, values, bias, topo, other, None, other_topo, shape[0], "silu")
                yield Product("gated", (x, values, sides, shape[0]), gated, label)


def on_cpu(argument: Any) -> Any:
    """An argument for the reference: in float64, where rounding does not hide a fault."""
    if isinstance(argument, Topology):
        return Topology(*(t.cpu() for t in argument))
    return argument.cpu().double() if isinstance(argument, Tensor) else argument


def few_programs(kernel: str) -> None:
    """Makes a persistent kernel's programs so few that each gets several tiles."""
    module = import_module(f"sparsify.kernels.linear.{kernel}")
    if hasattr(module, "multiprocessors"):
        module.multiprocessors = lambda device: PROGRAMS  # pyright: ignore[reportAttributeAccessIssue]


def check(product: Product, kernel: str, function: Callable[..., Tensor]) -> bool:
    """Runs one kernel; says what came of it."""
    few_programs(kernel)
    result = function(*product.arguments).cpu().double()
    exact = getattr(reference, product.op)(*map(on_cpu, product.arguments))
    error = float((result - exact).abs().max() / exact.abs().max())
    right = error < 0.02  # also false for NaN
    print(
        f"{'ok   ' if right else 'WRONG'} {kernel:18} {product.op:6} {product.label}: {error:.1e}", flush=True
    )
    return right


def run(only: str, device: str) -> int:
    """Runs all; the number of wrong results."""
    torch.manual_seed(0)
    ran, wrong = set(), 0
    for product in products(device):
        for kernel in dict.fromkeys(c.kernel for c in dispatch.candidates(product.op, *product.operands)):
            if only in kernel:
                function = dispatch.load(dispatch.Candidate(kernel), product.op)
                wrong += not check(product, kernel, function)
                ran.add(kernel)
    print(f"{len(ran)} kernels ran: {', '.join(sorted(ran)) or 'none'}; {wrong} results wrong")
    return wrong


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose name contains NAME")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: no CUDA GPU here; without one the tests run the kernels in Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read by torch at the first allocation
    return int(run(options.only, "cuda") > 0)


if __name__ == "__main__":
    sys.exit(main())
