"""The grouped operators: registration, autograd twice over, compile, autocast, and what they refuse."""

import pytest
import torch

from sparsify.kernels.grouped.ops import (
    block_sparse_grouped,
    block_sparse_grouped_activated,
    group_by_expert,
)
from sparsify.kernels.grouped.reference import Groups
from sparsify.kernels.storage import pack
from tests.kernels.grouped_oracle import CASES, Case, dense, make

ODD = Case(15, 2, 4, 70, 100, (16, 32), routing="none")
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def _leaves(o):
    return [t.clone().requires_grad_() for t in (o.x, o.values, o.bias)]


@pytest.mark.parametrize("name", ["grouped", "grouped_dx", "grouped_dw", "grouped_activated", "group"])
def test_opcheck(name):
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    dy, topo, groups = o.dy.clone().requires_grad_(), list(o.topo), list(o.groups)
    args = {
        "grouped": (x, values, bias, topo, groups, 70),
        "grouped_dx": (dy, values, topo, groups, 100),
        "grouped_dw": (dy, x, topo, groups, 32, 16),
        "grouped_activated": (o.x, o.values, o.bias, o.scale, topo, groups, 70, "silu", True),
        "group": (o.experts, 4),
    }[name]
    torch.library.opcheck(getattr(torch.ops.sparsify, name).default, args)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_dense_experts(case):
    o = make(case, torch.float64)
    x, values = o.x.clone().requires_grad_(), o.values.clone().requires_grad_()
    bias = None if o.bias is None else o.bias.clone().requires_grad_()
    y = block_sparse_grouped(x, values, bias, o.topo, o.groups, case.out_features)
    y.backward(o.dy)
    exact, dx, dw = dense(o, torch.float64)
    torch.testing.assert_close(y, exact, **EXACT)
    torch.testing.assert_close(x.grad, dx.view(case.tokens, case.top, -1).sum(1), **EXACT)
    packed = torch.cat([pack(matrix, mask) for matrix, mask in zip(dw, o.masks, strict=True)])
    torch.testing.assert_close(values.grad, packed, **EXACT)
    if bias is not None:
        sums = [o.dy[o.experts == expert].sum(0) for expert in range(case.experts)]
        torch.testing.assert_close(bias.grad, torch.stack(sums), **EXACT)


@pytest.mark.parametrize("top", [1, 2])
def test_second_derivatives(top):
    o = make(Case(4, top, 3, 20, 24, (8, 16), routing="none"), torch.float64)
    x, values, bias = _leaves(o)
    torch.autograd.gradgradcheck(
        lambda x, v, b: block_sparse_grouped(x, v, b, o.topo, o.groups, 20), (x, values, bias), fast_mode=True
    )


@pytest.mark.parametrize("frozen", ["x", "values"])
def test_a_frozen_operand_gets_no_gradient(frozen):
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    {"x": x, "values": values}[frozen].requires_grad_(False)
    block_sparse_grouped(x, values, bias, o.topo, o.groups, 70).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (values.grad is None) == (frozen == "values")


def test_no_tokens_give_zero_gradients():
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    groups = group_by_expert(o.experts[:0], 4)
    y = block_sparse_grouped(x[:0], values, bias, o.topo, groups, 70)
    assert y.shape == (0, 70)
    y.sum().backward()
    assert values.grad is not None and not values.grad.any() and not bias.grad.any()
    y = block_sparse_grouped_activated(x.detach()[:0], o.values, None, o.topo, groups, 70, "relu", gated=True)
    assert y.shape == (0, 35)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    o = make(ODD, torch.float32)

    def run(x, values, bias, experts):
        groups = group_by_expert(experts, 4)
        return torch.relu(block_sparse_grouped(x, values, bias, o.topo, groups, 70)).square().sum()

    def infer(x, values, bias, experts):
        groups = group_by_expert(experts, 4)
        scale = torch.ones(len(experts))
        return block_sparse_grouped_activated(x, values, bias, o.topo, groups, 70, "gelu", scale, True)

    eager, compiled = _leaves(o), _leaves(o)
    run(*eager, o.experts).backward()
    options = {"fullgraph": True, "dynamic": dynamic, "backend": "aot_eager"}
    torch.compile(run, **options)(*compiled, o.experts).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        arguments = o.x, o.values, o.bias, o.experts
        torch.testing.assert_close(torch.compile(infer, **options)(*arguments), infer(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_a_linear_layer_does(dtype):
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    with torch.autocast("cpu", dtype=dtype):
        y = block_sparse_grouped(x, values, bias, o.topo, o.groups, 70)
        mixed = block_sparse_grouped(x.to(dtype), values, bias, o.topo, o.groups, 70)
        with torch.no_grad():
            scaled = block_sparse_grouped_activated(x, values, bias, o.topo, o.groups, 70, "", o.scale)
        graph = torch.ops.sparsify.grouped(x, values, bias, list(o.topo), list(o.groups), 70)
    assert y.dtype == mixed.dtype == scaled.dtype == graph.dtype == dtype
    exact = dense(o, torch.float32)[0]
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(y, graph)
    torch.testing.assert_close(scaled.float(), exact * o.scale[:, None], atol=0.05, rtol=0.05)
    y.float().square().sum().backward()
    assert x.grad.dtype == values.grad.dtype == bias.grad.dtype == torch.float32
    assert values.grad.any()


def test_a_graph_recorded_for_inference_has_no_gradient():
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    run = torch.ops.sparsify.grouped_activated
    y = run(x, values, bias, None, list(o.topo), list(o.groups), 70, "silu", False)
    with pytest.raises(RuntimeError, match="trace or export the model with gradients enabled"):
        y.sum().backward()


def test_wrong_operands_are_named():
    o = make(ODD, torch.float32)
    product = block_sparse_grouped
    with pytest.raises(ValueError, match=r"got 64 features, expected 97 to 128"):
        product(o.x[:, :64], o.values, o.bias, o.topo, o.groups, 70)
    with pytest.raises(ValueError, match=r"operands of one dtype"):
        product(o.x.bfloat16(), o.values, o.bias, o.topo, o.groups, 70)
    with pytest.raises(ValueError, match=r"30 slots do not fit 14 rows"):
        product(o.x[:14], o.values, o.bias, o.topo, o.groups, 70)
    with pytest.raises(ValueError, match=r"20 block rows are not those of 3 matrices"):
        product(o.x, o.values, o.bias, o.topo, Groups(o.groups.order, o.groups.offsets[:4]), 70)
    arguments = o.x, o.values, o.bias, o.topo, o.groups
    with pytest.raises(ValueError, match="unknown activation 'tanh': expected one of relu"):
        block_sparse_grouped_activated(*arguments, 70, "tanh")
    with pytest.raises(ValueError, match="two halves: got 71 features"):
        block_sparse_grouped_activated(*arguments, 71, "silu", None, True)
