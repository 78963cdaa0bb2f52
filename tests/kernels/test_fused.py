"""What follows the forward product inside its kernel: activations, a factor, and the gated MLP made of both."""

import ast
import inspect
import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparsify.kernels.linear import reference
from tests.kernels.oracle import Case, assert_close, in_turn, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUNCTIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
CASES = [
    Case(63, 100, 70, (32, 16), empty_row=True),  # both sides padded
    Case(1, 96, 64, (16, 16), bias=False),
    Case(40, 64, 96, (32, 32), density=0.0),  # all empty: the activation of the bias
    Case(33, 130, 200, (128, 16), density=0.4),
    Case(9, 70, 600, (16, 64), density=0.6),
]


def _kernel(name):
    if name == "reference":
        return reference.dsd
    if not INTERPRETED:
        pytest.skip("with a GPU the compiled kernels are tested, see tests/gpu")
    return import_module(f"sparsify.kernels.linear.triton_{name}").dsd


def test_every_activation_is_tested():
    assert tuple(FUNCTIONS) == reference.ACTIVATIONS


def test_every_kernel_takes_what_the_reference_takes():
    """Read, not imported: not every kernel can be imported without its GPU."""
    folder = Path(reference.__file__).parent
    for name in ("dsd", "gated"):
        expected = list(inspect.signature(getattr(reference, name)).parameters)
        for path in [*folder.glob("triton_*.py"), *folder.glob("hopper_*.py")]:
            for function in ast.parse(path.read_text()).body:
                if isinstance(function, ast.FunctionDef) and function.name == name:
                    assert [argument.arg for argument in function.args.args] == expected, path.name


@pytest.mark.parametrize("kernel", ["reference", "dsd", "decode"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS, ids=lambda name: name or "none")
@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES))
def test_activation_and_factor(case, dtype, activation, kernel):
    if kernel == "decode" and case.tokens > 32:
        pytest.skip("the decode kernel takes up to 32 tokens")
    o, run, function = make(case, dtype), _kernel(kernel), FUNCTIONS[activation]
    x, weight = 4 * o.x, o.weight  # wide enough to reach both tails of the activations
    bias = None if o.bias is None else o.bias.double()
    exact = function(F.linear(x.double(), weight.double(), bias))
    dense = function(F.linear(x, weight, o.bias))
    y = run(x, o.values, o.bias, o.topo, case.out_features, activation)
    assert y.is_contiguous()
    assert_close(y, exact, dense)
    y = run(x, o.values, o.bias, o.topo, case.out_features, activation, o.dy)
    assert_close(y, exact * o.dy.double(), dense * o.dy)


@pytest.mark.parametrize("kernel", ["reference", "dsd"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS, ids=lambda name: name or "none")
def test_infinities_and_nan_come_out_as_in_dense(activation, kernel):
    o, run = make(Case(5, 32, 32, (16, 16), density=1.0), torch.float32), _kernel(kernel)
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 200.0, -200.0])
    x = special[:, None].expand(5, 32).contiguous()
    values = torch.ones_like(o.values)
    before = F.linear(x, torch.ones_like(o.weight), o.bias)
    if kernel == "dsd":
        before = before.double()  # torch's float32 GELU of infinity is NaN on the CPU
    expected = FUNCTIONS[activation](before).float()
    torch.testing.assert_close(run(x, values, o.bias, o.topo, 32, activation), expected, equal_nan=True)


def test_gated_reference():
    gate, up = make(CASES[0], torch.float32), make(Case(63, 100, 70, (16, 64), bias=False), torch.float32)
    y = reference.gated(gate.x, gate.values, gate.bias, gate.topo, up.values, up.bias, up.topo, 100, "silu")
    x = gate.x.double()
    exact = F.silu(F.linear(x, gate.weight.double(), gate.bias.double())) * F.linear(x, up.weight.double())
    dense = F.silu(F.linear(gate.x, gate.weight, gate.bias)) * F.linear(gate.x, up.weight)
    assert_close(y, exact, dense)
