"""Cases and oracle of the block-sparse products, shared by the CPU and the GPU tests.

A product is checked against dense float64. Its tolerance is not tuned case by case: it is twice the error that dense
torch makes in the same dtype against the same float64 result, plus one rounding of the dtype, plus eight roundings of
float32, the accumulator, for adding up in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.blocks import BlockMask, BlockShape
from sparsify.kernels.storage import Topology, pack, topology


@dataclass(frozen=True)
class Case:
    """Sizes of one product, and how its mask is made."""

    tokens: int
    out_features: int
    in_features: int
    block: tuple[int, int]
    density: float = 0.5
    empty_row: bool = False
    bias: bool = True
    pattern: str = "uniform"

    def __str__(self) -> str:
        kind = f"{self.density:g}" if self.pattern == "uniform" else self.pattern
        kind += "-empty_row" if self.empty_row else ""
        return f"M{self.tokens}-{self.out_features}x{self.in_features}-{self.block[0]}x{self.block[1]}-{kind}"


CASES = [
    Case(64, 128, 128, (32, 32)),
    Case(63, 100, 70, (32, 16), empty_row=True),  # both sides padded
    Case(1, 96, 64, (16, 16), bias=False),
    Case(17, 40, 24, (8, 8)),
    Case(5, 130, 200, (128, 16), density=0.4),  # tall
    Case(33, 48, 300, (16, 128)),  # wide
    Case(9, 300, 257, (256, 256)),  # largest block, one element past a block
    Case(130, 65, 129, (64, 64)),
    Case(7, 64, 64, (64, 64), density=1.0),  # one block, full
    Case(40, 64, 96, (32, 32), density=0.0),  # all empty
    Case(16, 96, 96, (8, 64), density=1.0),
    Case(3, 20, 9, (32, 32), density=1.0),  # weight smaller than its only block
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def in_turn(cases: Sequence[Any]) -> list[Any]:
    """Parameters `(case, dtype)`: the first case in the first dtype, the second in the second, and so on.

    For the interpreter, which is slow. A wrong index shows in any dtype, a sum or a rounding in the wrong one with
    any case; compiled kernels, whose tiles depend on both, are given every pair.
    """
    pairs = [(case, DTYPES[i % len(DTYPES)]) for i, case in enumerate(cases)]
    return [pytest.param(*pair, id="-".join(map(str, pair))) for pair in pairs]


@dataclass
class Operands:
    """Inputs of one case in `dtype`, and the masked dense weight that goes with them."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: BlockMask
    values: Tensor
    topo: Topology


# Masks that are not random: the kept blocks by row and column of the grid.
PATTERNS = {
    "full_row": lambda row, col: row == row.max(),  # one block row has all the work
    "full_col": lambda row, col: col == col.max(),
    "diagonal": lambda row, col: row % (col.max() + 1) == col,
    "corner": lambda row, col: (row == row.max()) & (col == col.max()),  # one block, in the padding
}


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> Operands:
    """Random operands of a case; every number is exact in `dtype`."""
    shape, block = (case.out_features, case.in_features), BlockShape(*case.block)
    rows, cols = block.grid(shape)
    if case.pattern == "uniform":
        keep = torch.rand(rows, cols) < case.density
    else:
        row, col = torch.arange(rows)[:, None].expand(rows, cols), torch.arange(cols).expand(rows, cols)
        keep = PATTERNS[case.pattern](row, col)
    if case.empty_row:
        keep[0] = False
    mask = BlockMask(keep, shape, block)
    weight = (torch.randn(shape) / case.in_features**0.5 * mask.elements()).to(device, dtype)
    x = torch.randn(case.tokens, case.in_features).to(device, dtype)
    dy = torch.randn(case.tokens, case.out_features).to(device, dtype)
    bias = torch.randn(case.out_features).to(device, dtype) if case.bias else None
    crow, col = (index.to(device) for index in mask.csr())
    topo = topology(crow, col, block.grid(shape)[1])
    return Operands(x, dy, weight, bias, mask, pack(weight, mask), topo)


def assert_close(actual: Tensor, exact: Tensor, dense: Tensor) -> None:
    """Fails if `actual` is further from float64 `exact` than the tolerance that `dense` (same dtype) earns."""
    assert actual.dtype == dense.dtype and actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    scale = exact.abs().max().clamp_min(1e-6)
    roundings = torch.finfo(actual.dtype).eps + 8 * torch.finfo(torch.float32).eps
    allowed = 2 * (dense.double() - exact).abs().max() + roundings * scale
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, scale {scale:.3g}"


def check_products(case: Case, dtype: torch.dtype, dsd, dds, sdd, device: str = "cpu") -> None:
    """Checks one implementation of the three products against dense float64."""
    o = make(case, dtype, device)
    x, dy, weight = o.x.double(), o.dy.double(), o.weight.double()
    bias = None if o.bias is None else o.bias.double()
    linear = torch.nn.functional.linear
    y = dsd(o.x, o.values, o.bias, o.topo, case.out_features)
    assert y.is_contiguous()
    assert_close(y, linear(x, weight, bias), linear(o.x, o.weight, o.bias))
    dx = dds(o.dy, o.values, o.topo, case.in_features)
    assert_close(dx, dy @ weight, o.dy @ o.weight)
    dw = sdd(o.dy, o.x, o.topo, o.values.shape[1], o.values.shape[2])
    assert dw.shape == o.values.shape and dw.dtype == dtype
    padding = pack(torch.ones_like(o.weight), o.mask) == 0
    assert not dw[padding].any()  # the gradient of the padding is exactly zero, so that it is never trained
    if dw.numel():
        assert_close(dw, pack(dy.T @ x, o.mask), pack(o.dy.T @ o.x, o.mask))
