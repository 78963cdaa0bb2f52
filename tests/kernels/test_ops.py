"""The torch operators: registration, autograd twice over, compile, autocast, and what they refuse."""

import pytest
import torch

from sparsify.kernels.linear.ops import block_sparse_linear
from sparsify.kernels.storage import pack
from tests.kernels.oracle import CASES, Case, make

ODD = Case(15, 70, 100, (16, 32), empty_row=True)
linear = torch.nn.functional.linear


def _leaves(o):
    return [t.clone().requires_grad_() for t in (o.x, o.values, o.bias)]


@pytest.mark.parametrize("name", ["dsd", "dds", "sdd"])
def test_opcheck(name):
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    dy, topo = o.dy.clone().requires_grad_(), list(o.topo)
    args = {"dsd": (x, values, bias, topo, 70), "dds": (dy, values, topo, 100), "sdd": (dy, x, topo, 32, 16)}[
        name
    ]
    torch.library.opcheck(getattr(torch.ops.sparsify, name).default, args)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_the_dense_layer(case):
    o = make(case, torch.float64)
    x, values = o.x.clone().requires_grad_(), o.values.clone().requires_grad_()
    xd, weight = o.x.clone().requires_grad_(), o.weight.clone().requires_grad_()
    bias = None if o.bias is None else o.bias.clone().requires_grad_()
    block_sparse_linear(x, values, bias, o.topo, case.out_features).backward(o.dy)
    linear(xd, weight, o.bias).backward(o.dy)
    torch.testing.assert_close(x.grad, xd.grad)
    torch.testing.assert_close(values.grad, pack(weight.grad, o.mask))
    if bias is not None:
        torch.testing.assert_close(bias.grad, o.dy.sum(0))


def test_second_derivatives():
    o = make(Case(3, 20, 24, (8, 16)), torch.float64)
    x, values, _ = _leaves(o)
    torch.autograd.gradgradcheck(
        lambda x, v: block_sparse_linear(x, v, None, o.topo, 20), (x, values), fast_mode=True
    )


@pytest.mark.parametrize("frozen", ["x", "values"])
def test_a_frozen_operand_gets_no_gradient(frozen):
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    {"x": x, "values": values}[frozen].requires_grad_(False)
    block_sparse_linear(x, values, bias, o.topo, 70).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (values.grad is None) == (frozen == "values")


def test_leading_dimensions_are_kept():
    o = make(ODD, torch.float32)
    y = block_sparse_linear(o.x.view(3, 5, 100), o.values, o.bias, o.topo, 70)
    assert y.shape == (3, 5, 70)
    torch.testing.assert_close(y.view(15, 70), linear(o.x, o.weight, o.bias))
    assert block_sparse_linear(o.x[:0], o.values, o.bias, o.topo, 70).shape == (0, 70)


def test_no_tokens_give_zero_gradients():
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    block_sparse_linear(x[:0], values, bias, o.topo, 70).sum().backward()
    assert values.grad is not None and not values.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    o = make(ODD, torch.float32)

    def run(x, values, bias):
        return torch.relu(block_sparse_linear(x, values, bias, o.topo, 70)).square().sum()

    eager, compiled = _leaves(o), _leaves(o)
    run(*eager).backward()
    torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_a_linear_layer_does(dtype):
    o = make(ODD, torch.float32)
    x, values, bias = _leaves(o)
    with torch.autocast("cpu", dtype=dtype):
        y = block_sparse_linear(x, values, bias, o.topo, 70)
        expected = linear(o.x, o.weight, o.bias)
        mixed = block_sparse_linear(x.to(dtype), values, bias, o.topo, 70)
    assert y.dtype == expected.dtype == mixed.dtype == dtype
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    y.float().square().sum().backward()
    assert x.grad.dtype == values.grad.dtype == bias.grad.dtype == torch.float32
    assert values.grad.any()


def test_wrong_operands_are_named():
    o = make(ODD, torch.float32)
    with pytest.raises(ValueError, match=r"got 64 features, expected 97 to 128"):
        block_sparse_linear(o.x[:, :64], o.values, o.bias, o.topo, 70)
    with pytest.raises(ValueError, match=r"operands of one dtype"):
        block_sparse_linear(o.x.bfloat16(), o.values, o.bias, o.topo, 70)
