"""The warp-specialised kernels against dense float64, and that dispatch reaches them."""

import pytest
import torch
import torch.nn.functional as F

from sparsify.kernels import dispatch
from sparsify.kernels.schedule import plans
from tests.kernels.oracle import Case, check_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]

SQUARE = [
    Case(1000, 512, 768, (128, 128), 0.3),
    Case(77, 384, 448, (64, 64), 0.25, empty_row=True),
    Case(300, 1000, 904, (64, 64), 0.5),  # padded on both sides
    Case(4096, 1024, 512, (256, 64), 0.1),
    Case(257, 640, 512, (64, 128), 0.5),
    Case(513, 512, 512, (256, 256), 1.0, bias=False),
    Case(130, 320, 512, (64, 64), 0.1),  # odd number of block rows, most blocks missing
    Case(64, 256, 256, (128, 64), 0.0),
]
NARROW = [
    Case(1000, 512, 768, (128, 16), 0.3),  # tall: read in place
    Case(777, 1000, 904, (256, 16), 0.25, empty_row=True),
    Case(4096, 512, 512, (128, 32), 0.1, bias=False),
    Case(1000, 512, 768, (32, 32), 0.25),  # stacked
    Case(577, 384, 448, (16, 16), 0.5, empty_row=True),
    Case(600, 1000, 904, (64, 16), 0.4),
    Case(640, 640, 512, (32, 64), 0.3),
    Case(513, 512, 512, (16, 128), 0.4),
    Case(1025, 512, 640, (64, 32), 0.1, bias=False),
    Case(520, 256, 256, (32, 16), 0.0),
]
DECODE = [
    Case(1, 1000, 2056, (64, 64), 0.4, empty_row=True),
    Case(5, 1024, 4096, (64, 64), 0.25),  # rows shared by several programs
    Case(16, 768, 1000, (128, 16), 0.25),
    Case(33, 1024, 1024, (256, 16), 0.2),
    Case(64, 512, 1024, (256, 128), 0.4, bias=False),
    Case(8, 4096, 512, (64, 32), 0.9),
    Case(3, 512, 512, (128, 32), 0.05),
]


def _check(case, dtype, expected):
    used = []

    def product(name):
        def run(*args):
            operand, other = args[:2]
            block = tuple(other.shape[1:]) if name != "sdd" else args[3:5]
            kernel = dispatch.choose(name, operand, other, block, args[-1] if name != "sdd" else 0)
            used.append(kernel.__module__.rsplit(".", 1)[1])
            poison = torch.full((1 << 22,), float("nan"), device="cuda")
            del poison
            first = kernel(*args)
            assert torch.equal(first, kernel(*args))  # the same from run to run
            return first

        return run

    check_products(case, dtype, product("dsd"), product("dds"), product("sdd"), device="cuda")
    assert set(used) >= expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SQUARE, ids=str)
def test_square_blocks(case, dtype):
    _check(case, dtype, {"hopper_linear", "hopper_sdd"} if case.density else set())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_narrow_blocks(case, dtype):
    _check(case, dtype, {"hopper_narrow", "hopper_narrow_sdd"} if case.density else {"hopper_narrow_sdd"})


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decoding(case):
    _check(case, torch.bfloat16, {"hopper_decode"})


@pytest.mark.parametrize("tokens", [1, 31])
@pytest.mark.parametrize("block", [(16, 16), (8, 32), (32, 64)], ids=str)
def test_decoding_with_low_blocks(tokens, block):
    _check(Case(tokens, 1000, 2056, block, 0.4, empty_row=True), torch.bfloat16, {"triton_decode"})


@pytest.mark.parametrize("case", DECODE, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_decoding(case, activation):
    from sparsify.kernels.linear import hopper_decode
    from tests.kernels.oracle import assert_close, make

    gate, up = make(case, torch.bfloat16, "cuda"), make(case, torch.bfloat16, "cuda")
    arguments = (
        gate.x, gate.values, gate.bias, gate.topo, up.values, up.bias, up.topo, case.out_features, activation
    )  # fmt: skip

    def dense(dtype):
        weights = [None if t is None else t.to(dtype) for t in (gate.weight, gate.bias, up.weight, up.bias)]
        x = gate.x.to(dtype)
        first, second = F.linear(x, *weights[:2]), F.linear(x, *weights[2:])
        return getattr(F, activation)(first) * second

    with torch.no_grad():
        y = hopper_decode.gated(*arguments)
        assert_close(y, dense(torch.float64), dense(torch.bfloat16))
        assert torch.equal(y, hopper_decode.gated(*arguments))  # the second call starts to read early


def test_weights_written_by_the_kernel_in_front_are_not_read_early():
    from tests.kernels.oracle import make

    case = Case(1, 4096, 4096, (64, 64), 0.5, bias=False)
    o = make(case, torch.bfloat16, "cuda")
    other = torch.randn_like(o.values)
    kernel = dispatch.choose("dsd", o.x, o.values, (64, 64), case.out_features)

    def product():
        return kernel(o.x, o.values, None, o.topo, case.out_features)

    with torch.no_grad():
        product()
        for _ in range(50):
            o.values.copy_(other)
            after = product()
            again = product()
            assert torch.equal(after, again)
            other = torch.randn_like(other)


@pytest.mark.parametrize("tokens", [8, 512])
def test_weights_that_move_are_served_by_one_plan(tokens):
    from tests.kernels.oracle import make

    case = Case(tokens, 512, 512, (64, 64), 0.5, bias=False)
    o = make(case, torch.bfloat16, "cuda")
    kernel = dispatch.choose("dsd", o.x, o.values, (64, 64), 512)
    first, copies = kernel(o.x, o.values, None, o.topo, 512), [o.values.clone() for _ in range(5)]
    made = len(plans(o.topo))
    assert made > 0
    for values in copies:  # as mixed precision makes them, at another address in each step
        assert torch.equal(kernel(o.x, values, None, o.topo, 512), first)
        assert not torch.equal(kernel(o.x, -2 * values, None, o.topo, 512), first)
    assert len(plans(o.topo)) == made


def test_a_changed_mask_is_not_served_from_the_cache():
    from tests.kernels.oracle import make

    case = Case(200, 512, 512, (64, 64), 0.5)
    for _ in range(6):  # freed index tensors come back at the same addresses
        o = make(case, torch.bfloat16, "cuda")
        kernel = dispatch.choose("dsd", o.x, o.values, (64, 64), 512)
        y = kernel(o.x, o.values, o.bias, o.topo, 512)
        torch.testing.assert_close(y, torch.nn.functional.linear(o.x, o.weight, o.bias), rtol=0.02, atol=0.02)
        del o


def test_rows_the_copy_engine_cannot_address_take_the_portable_kernel():
    x = torch.randn(100, 101, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(3, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert dispatch.choose("dsd", x, values, (64, 64), 128).__module__.endswith("triton_dsd")
