"""The grouped products, in the torch reference and in the Triton kernels (interpreter), against dense float64."""

import os

import pytest
import torch
from torch.nn import functional as F

from sparsify.kernels.grouped import reference as grouped_reference
from sparsify.kernels.grouped.reference import experts_of, group
from tests.kernels.grouped_oracle import CASES, Case, check_activated, check_products, make, route
from tests.kernels.oracle import DTYPES, in_turn

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="with a GPU the compiled kernels are tested, see tests/gpu",
)
FUNCTIONS = {"": lambda y: y, "silu": F.silu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
GATED = [
    Case(19, 2, 4, 128, 70, (32, 16), routing="few"),
    Case(1, 3, 4, 64, 100, (16, 32), routing="none"),
    Case(5, 2, 2, 256, 64, (128, 64), bias=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, dtype):
    reference = grouped_reference
    check_products(case, dtype, reference.grouped, reference.grouped_dx, reference.grouped_dw)


@INTERPRETED
@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES))
def test_triton_kernels_in_the_interpreter(case, dtype):
    from sparsify.kernels.grouped import triton_grouped as kernels

    check_products(case, dtype, kernels.grouped, kernels.grouped_dx, kernels.grouped_dw)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", GATED, ids=str)
@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=INTERPRETED)])
def test_what_follows_the_product(case, name, kernel):
    if kernel == "triton":
        from sparsify.kernels.grouped.triton_grouped import grouped
    else:
        grouped = grouped_reference.grouped
    check_activated(case, torch.float32, grouped, name, FUNCTIONS[name])


@INTERPRETED
@pytest.mark.parametrize(
    ("tokens", "options"),
    [(5, {"tile": 1}), (40, {"tile": 16, "part": 16}), (40, {"tile": 64, "part": 32, "step": 128})],
    ids=str,
)
def test_other_tiles_compute_the_same(tokens, options):
    from sparsify.kernels.grouped.triton_grouped import grouped

    case = Case(tokens, 2, 3, 128, 96, (32, 32), routing="none")
    o = make(case, torch.float32)
    arguments = (o.x, o.values, o.bias, o.topo, o.groups, 128, "silu", o.scale, True)
    torch.testing.assert_close(grouped(*arguments, **options), grouped_reference.grouped(*arguments))


@INTERPRETED
def test_bands_cover_all_tiles():
    """More tiles of slots than a band has, the last band not full."""
    from sparsify.kernels.grouped.triton_grouped import BAND, grouped

    case = Case(90, 2, 11, 64, 32, (32, 32))
    o = make(case, torch.float32)
    assert sum(-(-int((o.experts == e).sum()) // 16) for e in range(11)) > BAND
    y = grouped(o.x, o.values, o.bias, o.topo, o.groups, 64, tile=16)
    torch.testing.assert_close(y, grouped_reference.grouped(o.x, o.values, o.bias, o.topo, o.groups, 64))


@INTERPRETED
def test_weights_of_experts_without_slots_are_not_read():
    from sparsify.kernels.grouped.triton_grouped import grouped

    case = Case(2, 2, 6, 64, 64, (32, 32), routing="few", density=1.0)
    o = make(case, torch.float32)
    expected = grouped_reference.grouped(o.x, o.values, o.bias, o.topo, o.groups, 64)
    start = sum(mask.blocks_kept for mask in o.masks[:3])
    assert not (o.experts >= 3).any()
    short = torch.cat([o.values[:start], torch.full_like(o.values[start:], float("nan"))])
    torch.testing.assert_close(grouped(o.x, short, o.bias, o.topo, o.groups, 64), expected)
    crow = o.topo.crow.clone()
    crow[3 * 2 + 1 :] = 2**31 - 1  # where their blocks would be
    torch.testing.assert_close(
        grouped(o.x, short, o.bias, o.topo._replace(crow=crow), o.groups, 64), expected
    )


@INTERPRETED
def test_strided_activations():
    from sparsify.kernels.grouped import triton_grouped as kernels

    case = Case(9, 2, 3, 48, 40, (16, 16))
    o = make(case, torch.float32)
    x, dy = torch.randn(9, 80)[:, ::2], torch.randn(48, 18).T
    arguments = o.topo, o.groups
    expected = grouped_reference.grouped(x, o.values, o.bias, *arguments, 48)
    torch.testing.assert_close(kernels.grouped(x, o.values, o.bias, *arguments, 48), expected)
    expected = grouped_reference.grouped_dx(dy, o.values, *arguments, 40)
    torch.testing.assert_close(kernels.grouped_dx(dy, o.values, *arguments, 40), expected)
    expected = grouped_reference.grouped_dw(dy, x, *arguments, 16, 16)
    torch.testing.assert_close(kernels.grouped_dw(dy, x, *arguments, 16, 16), expected)


def _check_groups(groups, experts, count):
    order, offsets = groups
    assert order.dtype == offsets.dtype == torch.int32
    ordered = experts.clamp(max=count)
    assert torch.equal(order.long(), torch.argsort(ordered, stable=True))
    assert offsets.tolist() == [int((experts < expert).sum()) for expert in range(count + 1)]
    assert torch.equal(experts_of(groups), ordered)


@pytest.mark.parametrize("routing", ["uniform", "one", "few", "none"])
@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=INTERPRETED)])
def test_slots_are_sorted_by_expert(kernel, routing):
    if kernel == "triton":
        from sparsify.kernels.grouped.triton_grouped import group as sort
    else:
        sort = group
    for tokens, experts in ((17, 7), (1, 40), (50, 1)):
        chosen = route(Case(tokens, 2, experts, 16, 16, (16, 16), routing=routing))
        _check_groups(sort(chosen, experts), chosen, experts)
    _check_groups(sort(torch.tensor([9, 2, 3, 100]), 3), torch.tensor([9, 2, 3, 100]), 3)
    assert sort(torch.empty(0, dtype=torch.int64), 3).offsets.tolist() == [0] * 4
