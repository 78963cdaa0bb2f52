"""The convolutions' torch operators: registration, autograd twice over, compile, autocast, and what they refuse."""

import pytest
import torch

from sparsify.kernels.convolution import reference as conv_reference
from sparsify.kernels.convolution.ops import block_sparse_conv, indices
from tests.kernels.conv_oracle import CASES, Case, dense_products, make

ODD = Case((7, 6), (20, 24), (8, 16), stride=(2, 1), groups=2)
POINTWISE = Case((7, 6), (20, 24), (8, 16), kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0))


def _make(case, dtype=torch.float32):
    o = make(case, dtype)
    o.topo = indices(o.topo.crow, o.topo.col, o.geometry, o.layout.channel_grid(o.block)[1])
    return o


def _leaves(o):
    return [t.clone().requires_grad_() for t in (o.x, o.values, o.bias)]


@pytest.mark.parametrize("name", ["conv", "conv_dx", "conv_dw"])
def test_opcheck(name):
    o = _make(ODD)
    x, values, bias = _leaves(o)
    dy, topo, sizes = o.dy.clone().requires_grad_(), list(o.topo), list(o.geometry)
    args = {
        "conv": (x, values, bias, topo, sizes),
        "conv_dx": (dy, values, topo, sizes, 7, 6),
        "conv_dw": (dy, x, topo, sizes, 16, 8),
    }[name]
    torch.library.opcheck(getattr(torch.ops.sparsify, name).default, args)


@pytest.mark.parametrize("case", [*CASES, POINTWISE], ids=str)
def test_gradients_equal_those_of_the_dense_layer(case):
    o = _make(case, torch.float64)
    x, values = o.x.clone().requires_grad_(), o.values.clone().requires_grad_()
    bias = None if o.bias is None else o.bias.clone().requires_grad_()
    y = block_sparse_conv(x, values, bias, o.topo, o.geometry)
    y.backward(o.dy)
    dense, dx, dw = dense_products(o, torch.float64)
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(values.grad, o.layout.pack(dw, o.keep, o.block))
    if bias is not None:
        torch.testing.assert_close(bias.grad, o.dy.sum((0, 1, 2)))


@pytest.mark.parametrize("case", [ODD, POINTWISE], ids=["grouped", "pointwise"])
def test_second_derivatives(case):
    o = _make(case, torch.float64)
    x, values, _ = _leaves(o)
    torch.autograd.gradgradcheck(
        lambda x, v: block_sparse_conv(x, v, None, o.topo, o.geometry), (x, values), fast_mode=True
    )


@pytest.mark.parametrize("frozen", ["x", "values"])
def test_a_frozen_operand_gets_no_gradient(frozen):
    o = _make(ODD)
    x, values, bias = _leaves(o)
    {"x": x, "values": values}[frozen].requires_grad_(False)
    block_sparse_conv(x, values, bias, o.topo, o.geometry).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (values.grad is None) == (frozen == "values")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", [ODD, POINTWISE], ids=["grouped", "pointwise"])
def test_compiles_without_a_graph_break(case, dynamic):
    o = _make(case)

    def run(x, values, bias):
        return torch.relu(block_sparse_conv(x, values, bias, o.topo, o.geometry)).square().sum()

    eager, compiled = _leaves(o), _leaves(o)
    run(*eager).backward()
    torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_a_convolution_does(dtype):
    o = _make(ODD)
    x, values, bias = _leaves(o)
    with torch.autocast("cpu", dtype=dtype):
        y = block_sparse_conv(x, values, bias, o.topo, o.geometry)
        mixed = block_sparse_conv(x.to(dtype), values, bias, o.topo, o.geometry)
    assert y.dtype == mixed.dtype == dtype
    torch.testing.assert_close(y.float(), dense_products(o, torch.float32)[0], atol=0.05, rtol=0.05)
    y.float().square().sum().backward()
    assert x.grad.dtype == values.grad.dtype == bias.grad.dtype == torch.float32
    assert values.grad.any()


def test_wrong_operands_are_named():
    o = _make(ODD)
    with pytest.raises(ValueError, match=r"expected \(batch, height, width, 20\)"):
        block_sparse_conv(o.x[..., :10], o.values, o.bias, o.topo, o.geometry)
    with pytest.raises(ValueError, match=r"operands of one dtype"):
        block_sparse_conv(o.x.bfloat16(), o.values, o.bias, o.topo, o.geometry)
    with pytest.raises(ValueError, match=r"input of 2x0 .* smaller than the kernel"):
        block_sparse_conv(o.x[:, :2, :0], o.values, o.bias, o.topo, o.geometry)


def test_no_patches_are_gathered_side_by_side(monkeypatch):
    """The largest tensor that the CPU path makes is of the size of input or output, not nine times that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.seen = max(Largest.seen, result.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(conv_reference, "_small_blocks", lambda *_: False)
    o = _make(Case((24, 24), (32, 32), batch=4, density=0.3))
    with Largest():
        conv_reference.conv(o.x, o.values, o.bias, o.topo, o.geometry)
        conv_reference.conv_dx(o.dy, o.values, o.topo, o.geometry, 24, 24)
        conv_reference.conv_dw(o.dy, o.x, o.topo, o.geometry, 16, 16)
    assert o.x.nbytes <= Largest.seen < 2 * o.x.nbytes
