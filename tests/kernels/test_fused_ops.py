"""The fused forms as functions and torch operators: with and without gradients, traced, exported, under autocast."""

import pytest
import torch
from torch.nn import functional as F

from sparsify.kernels.linear import library, reference
from sparsify.kernels.linear.ops import Operand, block_sparse_gated, block_sparse_linear
from tests.kernels.oracle import Case, make

GATE = Case(15, 70, 100, (16, 32), empty_row=True)
UP = Case(15, 70, 100, (16, 32), bias=False)
OTHER_BLOCK = Case(15, 70, 100, (32, 8))


def _operand(o):
    return Operand(o.values, o.bias, o.topo)


def _dense(gate, up, x):
    return F.silu(F.linear(x, gate.weight, gate.bias)) * F.linear(x, up.weight, up.bias)


@pytest.fixture
def gate():
    return make(GATE, torch.float32)


@pytest.fixture
def up():
    return make(UP, torch.float32)


@pytest.mark.parametrize("name", ["activated", "gated"])
def test_opcheck(name, gate, up):
    args = {
        "activated": (gate.x, gate.values, gate.bias, list(gate.topo), 70, "gelu"),
        "gated": (
            gate.x,
            gate.values,
            gate.bias,
            list(gate.topo),
            up.values,
            None,
            list(up.topo),
            70,
            "silu",
        ),
    }[name]
    torch.library.opcheck(getattr(torch.ops.sparsify, name).default, args)


@pytest.mark.parametrize("shape", [(15, 100), (3, 5, 100), (5, 1, 3, 100), (0, 100), (2, 0, 100)], ids=str)
def test_leading_dimensions_are_kept(shape, gate, up):
    x = gate.x[: 15 if 0 not in shape else 0].view(shape)
    expected = _dense(gate, up, x)
    torch.testing.assert_close(block_sparse_gated(x, _operand(gate), _operand(up), 70, "silu"), expected)
    actual = block_sparse_linear(x, gate.values, gate.bias, gate.topo, 70, "relu")
    torch.testing.assert_close(actual, F.relu(F.linear(x, gate.weight, gate.bias)))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS, ids=lambda name: name or "none")
def test_with_gradients_it_equals_the_fused_form_and_dense(activation, gate, up, monkeypatch):
    fused = block_sparse_gated(gate.x, _operand(gate), _operand(up), 70, activation)
    monkeypatch.setattr(library, "gated", None)  # not to be called from here on
    tensors = [gate.x, gate.values, up.values]
    leaves = [t.clone().requires_grad_() for t in tensors]
    operands = Operand(leaves[1], gate.bias, gate.topo), Operand(leaves[2], None, up.topo)
    y = block_sparse_gated(leaves[0], *operands, 70, activation)
    torch.testing.assert_close(y, fused)
    y.square().sum().backward()
    dense = gate.x.clone().requires_grad_()
    pre = F.linear(dense, gate.weight, gate.bias)
    functions = {"": lambda t: t, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
    function = functions.get(activation) or getattr(F, activation)
    (function(pre) * F.linear(dense, up.weight)).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, dense.grad, rtol=1e-4, atol=1e-4)
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("wants", ["x", "gate", "gate_bias", "up"])
def test_one_operand_that_wants_a_gradient_is_enough(wants, gate, up):
    tensor = {"x": gate.x, "gate": gate.values, "gate_bias": gate.bias, "up": up.values}[wants]
    tensor.requires_grad_()
    y = block_sparse_gated(gate.x, _operand(gate), _operand(up), 70, "silu")
    y.sum().backward()
    assert tensor.grad is not None
    with torch.no_grad():
        assert not block_sparse_gated(gate.x, _operand(gate), _operand(up), 70, "silu").requires_grad


def test_halves_in_blocks_of_different_shapes(gate):
    other = make(OTHER_BLOCK, torch.float32)
    y = block_sparse_gated(gate.x, _operand(gate), _operand(other), 70, "silu")
    torch.testing.assert_close(y, _dense(gate, other, gate.x))


def test_two_products_where_no_kernel_computes_both(gate, up, monkeypatch):
    monkeypatch.setattr(
        library, "choose", lambda name, *_: None if name == "gated" else getattr(reference, name)
    )
    y = block_sparse_gated(gate.x, _operand(gate), _operand(up), 70, "silu")
    torch.testing.assert_close(y, _dense(gate, up, gate.x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_operator_without_a_graph_break(dynamic, gate, up):
    graphs = []

    def backend(module, _):
        graphs.append({node.target for node in module.graph.nodes})
        return module

    def run(x):
        y = block_sparse_gated(x, _operand(gate), _operand(up), 70, "silu")
        return y + block_sparse_linear(x, *_operand(up), 70, "gelu")

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
        torch.testing.assert_close(compiled(gate.x), run(gate.x))
    assert {torch.ops.sparsify.gated, torch.ops.sparsify.activated} <= graphs[0]
    assert torch.ops.sparsify.dsd not in graphs[0]


def test_compiles_with_gradients(gate, up):
    def run(x):
        return block_sparse_gated(x, _operand(gate), _operand(up), 70, "silu").square().sum()

    eager, compiled = gate.x.clone().requires_grad_(), gate.x.clone().requires_grad_()
    run(eager).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(eager.grad, compiled.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, gate, up):
    class Gated(torch.nn.Module):
        def forward(self, x):
            return block_sparse_gated(x, _operand(gate), _operand(up), 70, "silu")

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(Gated(), (gate.x,), dynamic_shapes=({0: tokens},), strict=strict)
        assert torch.ops.sparsify.gated.default in {node.target for node in program.graph.nodes}
        x = torch.randn(4, 100)
        torch.testing.assert_close(program.module()(x), _dense(gate, up, x))


@pytest.mark.parametrize("traced", [False, True], ids=["direct", "operator"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_layers_do(dtype, traced, gate, up, monkeypatch):
    if traced:
        monkeypatch.setattr("sparsify.kernels.linear.ops.plain", lambda *_: False)
    with torch.autocast("cpu", dtype=dtype):
        y = block_sparse_gated(gate.x, _operand(gate), _operand(up), 70, "silu")
        z = block_sparse_linear(gate.x, *_operand(gate), 70, "gelu")
        expected = _dense(gate, up, gate.x)
    assert y.dtype == z.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    double = make(GATE, torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert block_sparse_linear(double.x, *_operand(double), 70, "gelu").dtype == torch.float64


def test_a_recorded_inference_operator_has_no_gradient(gate):
    x = gate.x.clone().requires_grad_()
    y = torch.ops.sparsify.activated(x, gate.values, gate.bias, list(gate.topo), 70, "gelu")
    with pytest.raises(RuntimeError, match="recorded for inference"):
        y.sum().backward()


def test_what_does_not_fit_is_named(gate, up):
    with pytest.raises(ValueError, match="unknown activation 'swish': expected one of relu, gelu"):
        block_sparse_linear(gate.x, *_operand(gate), 70, "swish")
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        block_sparse_gated(gate.x, _operand(gate), _operand(up), 70, "swish")
    with pytest.raises(ValueError, match=r"got 64 features, expected 97 to 128"):
        block_sparse_gated(gate.x[:, :64], _operand(gate), _operand(up), 70, "silu")
    with pytest.raises(ValueError, match=r"operands of one dtype"):
        up.values = up.values.bfloat16()
        block_sparse_gated(gate.x, _operand(gate), _operand(up), 70, "silu")
