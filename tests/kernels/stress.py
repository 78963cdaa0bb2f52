"""Checks that every kernel must pass, wherever it runs; the tests on the CPU and on a GPU give them kernels.

`kernels(op, operand, other, block, width)` is a dictionary of the functions that take a product, by name, with the
arguments of `dispatch.candidates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from sparsify.kernels.linear import reference
from sparsify.kernels.storage import pack
from tests.kernels.oracle import Case, Operands, assert_close, make

Kernels: TypeAlias = Callable[[str, Tensor, Tensor, tuple[int, int], int], dict[str, Callable[..., Tensor]]]

# Few for decoding, both sides of every power of two that a tile may have, and enough for several tiles.
TOKENS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 257, 1000, 5000)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised is full of NaN, so that what a kernel forgets to write shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
        yield


def results(kernels: Kernels, o: Operands, x: Tensor, dy: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """`(op, kernel, result)` of the three products in every kernel that takes them; on a GPU computed twice."""
    (out_features, in_features), block = o.weight.shape, (o.values.shape[1], o.values.shape[2])
    calls = {
        "dsd": ((x, o.values, block, out_features), (x, o.values, o.bias, o.topo, out_features)),
        "dds": ((dy, o.values, block, in_features), (dy, o.values, o.topo, in_features)),
        "sdd": ((dy, x, block, o.topo.col.numel()), (dy, x, o.topo, *block)),
    }
    for op, (operands, arguments) in calls.items():
        for name, kernel in kernels(op, *operands).items():
            with poisoned_memory():
                first = kernel(*arguments)
                second = kernel(*arguments) if first.is_cuda else first
            assert first.is_contiguous(), (op, name)
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), (
                f"{op} in {name}: two results"
            )
            yield op, name, first


def check(
    kernels: Kernels,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> set[str]:
    """Compares every kernel with dense float64, and on a GPU its second run with its first.

    Args:
        kernels: What to check.
        case: Sizes and mask.
        dtype: Of all operands.
        device: Where they are made.
        arrange: Gives the activations and gradients another layout in memory, with the same or other contents.

    Returns:
        Names of the kernels that ran.
    """
    o, names = make(case, dtype, device), set()
    x, dy = arrange(o.x), arrange(o.dy)
    linear = torch.nn.functional.linear
    bias = None if o.bias is None else o.bias.double()
    exact = {
        "dsd": linear(x.double(), o.weight.double(), bias),
        "dds": dy.double() @ o.weight.double(),
        "sdd": pack(dy.double().T @ x.double(), o.mask),
    }
    near, dy_near = x.contiguous(), dy.contiguous()  # cuBLAS fails where rows are far apart
    dense = {
        "dsd": linear(near, o.weight, o.bias),
        "dds": dy_near @ o.weight,
        "sdd": pack(dy_near.T @ near, o.mask),
    }
    for op, name, result in results(kernels, o, x, dy):
        names.add(name)
        try:
            if result.numel():
                assert_close(result, exact[op], dense[op])
        except AssertionError as error:
            raise AssertionError(f"{op} in {name}: {error}") from error
    return names


def _contained(where: str, actual: Tensor, exact: Tensor, dense: Tensor) -> None:
    """Fails unless `actual` is `exact` where that or `dense` says so; where only `dense` is not finite, all may be."""
    must = ~exact.isfinite()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = (must & (kind(actual) != kind(exact))).nonzero()
        assert not len(wrong), f"{where}: {kind.__name__} lacks at {wrong[:5].tolist()}, {len(wrong)} in all"
    leaked = (dense.isfinite() & ~actual.isfinite()).nonzero()
    assert not len(leaked), f"{where}: not finite at {leaked[:5].tolist()}, {len(leaked)} in all"
    finite = actual.isfinite()
    torch.testing.assert_close(actual.double()[finite], exact[finite], rtol=0.02, atol=0.05)


def _exact(o: Operands, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The products in float64, where only stored blocks meet the operands."""
    (out_features, in_features), (_, block_in, block_out) = o.weight.shape, o.values.shape
    x, dy, values = x.double(), dy.double(), o.values.double()
    return {
        "dsd": reference.dsd(x, values, None if o.bias is None else o.bias.double(), o.topo, out_features),
        "dds": reference.dds(dy, values, o.topo, in_features),
        "sdd": reference.sdd(dy, x, o.topo, block_in, block_out),
    }


def check_containment(kernels: Kernels, case: Case, dtype: torch.dtype, device: str = "cpu") -> set[str]:
    """NaN and infinity show where a stored block meets them, and nowhere that dense would not show them.

    Dense shows more: there a missing block is a zero, and zero times NaN is NaN. A kernel may do as dense does.
    """
    o, names = make(case, dtype, device), set()
    (_, block_in, block_out), stored = o.values.shape, o.topo.col.numel()
    middle = stored // 2
    row, col = int(o.topo.row[middle]) * block_out, int(o.topo.col[middle]) * block_in
    x, dy = o.x.clone(), o.dy.clone()
    for operand, at in ((x, col), (dy, row)):
        operand[0, at] = float("nan")
        operand[1, at] = float("inf")
        operand[-1, min(at + 5, operand.shape[1] - 1)] = -float("inf")
    exact, weight = _exact(o, x, dy), o.weight.double()
    dense = {"dsd": x.double() @ weight.T, "dds": dy.double() @ weight, "sdd": exact["sdd"]}
    for op, name, result in results(kernels, o, x, dy):
        names.add(name)
        _contained(f"{op} in {name}", result, exact[op], dense[op])
    # A kernel that steps beyond the end of a panel multiplies its neighbour's weights, by zeros if it is careful.
    clean = o.values
    for op, chosen in (("dsd", o.topo.row % 2 == 1), ("dds", o.topo.col % 2 == 1)):
        o.values = clean.masked_fill(chosen[:, None, None], float("nan"))
        exact = _exact(o, o.x, o.dy)[op]
        for other, name, result in results(kernels, o, o.x, o.dy):
            if op == other:
                _contained(f"{op} with NaN weights in {name}", result, exact, exact)
    return names


def _misaligned(t: Tensor) -> Tensor:
    """The same matrix one element away from where the allocator aligns it."""
    buffer = t.new_zeros(t.numel() + 1)
    return buffer[1:].view(t.shape).copy_(t)


def _columns_apart(t: Tensor) -> Tensor:
    wide = t.new_full((t.shape[0], 2 * t.shape[1]), float("nan"))
    wide[:, ::2] = t
    return wide[:, ::2]


def _rows_apart(t: Tensor) -> Tensor:
    wide = t.new_full((t.shape[0], t.shape[1] + 3), float("nan"))
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


# Layouts in memory in which activations and gradients may come.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": _misaligned,
    "columns_apart": _columns_apart,
    "rows_apart": _rows_apart,
    "transposed": lambda t: t.T.contiguous().T,
    "one_row_expanded": lambda t: t[:1].expand(t.shape),
    "one_column_expanded": lambda t: t[:, :1].expand(t.shape),
}
