"""Cases and oracle of the grouped products, shared by the CPU and the GPU tests; tolerances are those of `oracle`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.blocks import BlockMask, BlockShape
from sparsify.kernels.grouped.reference import Groups, group
from sparsify.kernels.storage import Topology, pack, topology
from tests.kernels.oracle import assert_close


@dataclass(frozen=True)
class Case:
    """Sizes of a product with several matrices, and who gets which tokens.

    Attributes:
        tokens: Rows of the activations, `T`.
        top: Slots a token.
        experts: Matrices, `E`.
        out_features: `N`.
        in_features: `K`.
        block: `(bo, bi)`.
        density: Share of the blocks that is kept.
        routing: `uniform`, `one` (all slots), `few` (the first half of the experts) or `none` (some slots have none).
        bias: Whether there is one.
    """

    tokens: int
    top: int
    experts: int
    out_features: int
    in_features: int
    block: tuple[int, int]
    density: float = 0.4
    routing: str = "uniform"
    bias: bool = True

    def __str__(self) -> str:
        sizes = f"T{self.tokens}x{self.top}-E{self.experts}-{self.out_features}x{self.in_features}"
        return f"{sizes}-{self.block[0]}x{self.block[1]}-{self.density:g}-{self.routing}"


CASES = [
    Case(32, 2, 4, 64, 64, (32, 32), bias=False),
    Case(21, 2, 4, 100, 70, (32, 16), routing="few"),  # both sides padded, experts without slots
    Case(7, 3, 3, 40, 24, (8, 8), routing="none"),
    Case(1, 4, 9, 96, 64, (16, 16)),  # decoding
    Case(70, 1, 3, 130, 200, (64, 64), routing="one"),
    Case(5, 2, 2, 130, 100, (128, 16), bias=False),  # tall
    Case(9, 2, 4, 48, 140, (16, 128), routing="none"),  # wide
    Case(6, 2, 3, 64, 96, (32, 32), density=0.0),
    Case(21, 1, 1, 72, 40, (64, 32), density=1.0),
]


@dataclass
class Operands:
    """Inputs of one case in `dtype`, and the masked dense weights that go with them."""

    x: Tensor
    dy: Tensor
    weight: Tensor  # [E, N, K]
    bias: Tensor | None
    masks: list[BlockMask]
    values: Tensor
    topo: Topology
    experts: Tensor  # [S]
    groups: Groups
    scale: Tensor  # [S] float32


def stacked(masks: list[BlockMask]) -> Topology:
    """Indices of matrices stored one after the other."""
    parts = [topology(*mask.csr(), mask.keep.shape[1]) for mask in masks]
    crow, start = [torch.zeros(1, dtype=torch.int32)], 0
    for part in parts:
        crow.append(part.crow[1:] + start)
        start += part.col.numel()
    return Topology(torch.cat(crow), *(torch.cat(fields) for fields in list(zip(*parts, strict=True))[1:]))


def route(case: Case) -> Tensor:
    """`(S,)` expert of each slot; those of one token differ where they can."""
    count = {"one": 1, "few": max(1, case.experts // 2)}.get(case.routing, case.experts)
    experts = torch.rand(case.tokens, max(count, case.top)).argsort(1)[:, : case.top] % count
    if case.routing == "none":
        experts[torch.rand(experts.shape) < 0.3] = case.experts
    if case.routing == "one":
        experts += case.experts - 1
    return experts.flatten()


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> Operands:
    """Random operands of a case; every number is exact in `dtype`."""
    shape, block, slots = (
        (case.out_features, case.in_features),
        BlockShape(*case.block),
        case.tokens * case.top,
    )
    masks = [
        BlockMask(torch.rand(block.grid(shape)) < case.density, shape, block) for _ in range(case.experts)
    ]
    kept = torch.stack([mask.elements() for mask in masks])
    weight = (torch.randn(kept.shape) / case.in_features**0.5 * kept).to(device, dtype)
    values = torch.cat([pack(matrix, mask) for matrix, mask in zip(weight, masks, strict=True)])
    experts = route(case)
    return Operands(
        x=torch.randn(case.tokens, case.in_features).to(device, dtype),
        dy=torch.randn(slots, case.out_features).to(device, dtype),
        weight=weight,
        bias=torch.randn(case.experts, case.out_features).to(device, dtype) if case.bias else None,
        masks=masks,
        values=values,
        topo=Topology(*(index.to(device) for index in stacked(masks))),
        experts=experts.to(device),
        groups=Groups(*(index.to(device) for index in group(experts, case.experts))),
        scale=torch.rand(slots, device=device),
    )


def dense(o: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`y`, `dx` slot by slot, and `dW` of every expert, computed in `dtype` with a loop over slots' experts."""
    slots = len(o.experts)
    x = o.x.to(dtype).repeat_interleave(slots // len(o.x), 0)
    y, dx, dw = x.new_zeros(slots, o.dy.shape[1]), torch.zeros_like(x), []
    for expert, weight in enumerate(o.weight.to(dtype)):
        own = o.experts == expert
        bias = None if o.bias is None else o.bias[expert].to(dtype)
        y[own] = torch.nn.functional.linear(x[own], weight, bias)
        dx[own] = o.dy[own].to(dtype) @ weight
        dw.append(o.dy[own].to(dtype).T @ x[own])
    return y, dx, dw


def check_products(
    case: Case,
    dtype: torch.dtype,
    grouped: Callable,
    grouped_dx: Callable,
    grouped_dw: Callable,
    device="cpu",
) -> None:
    """Checks one implementation of the three products against dense float64."""
    o = make(case, dtype, device)
    exact, rounded = dense(o, torch.float64), dense(o, dtype)
    y = grouped(o.x, o.values, o.bias, o.topo, o.groups, case.out_features)
    assert y.is_contiguous()
    assert_close(y, exact[0], rounded[0])
    assert not y[o.experts >= case.experts].any()
    assert_close(grouped_dx(o.dy, o.values, o.topo, o.groups, case.in_features), exact[1], rounded[1])
    dw = grouped_dw(o.dy, o.x, o.topo, o.groups, *o.values.shape[1:])
    assert dw.shape == o.values.shape and dw.dtype == dtype
    start = 0
    for expert, mask in enumerate(o.masks):
        own = dw[start : start + mask.blocks_kept]
        start += mask.blocks_kept
        assert not own[pack(torch.ones_like(o.weight[expert]), mask) == 0].any()  # padding is never trained
        if own.numel():
            assert_close(own, pack(exact[2][expert], mask), pack(rounded[2][expert], mask))


def check_activated(
    case: Case, dtype: torch.dtype, grouped: Callable, name: str, function, device="cpu"
) -> None:
    """Checks what follows the forward product: an activation of all features, or of half of them, and a factor."""
    o = make(case, dtype, device)
    for gated in (False, True):

        def finish(y, gated=gated):
            half = y.shape[1] // 2
            y = function(y[:, :half]) * y[:, half:] if gated else function(y)
            y = y * o.scale[:, None].to(y.dtype)
            return y * (o.experts < case.experts)[:, None]

        exact, rounded = finish(dense(o, torch.float64)[0]), finish(dense(o, dtype)[0])
        if gated and case.out_features % (2 * case.block[0]):
            continue
        y = grouped(o.x, o.values, o.bias, o.topo, o.groups, case.out_features, name, o.scale, gated)
        assert y.is_contiguous()
        assert_close(y, exact, rounded)
