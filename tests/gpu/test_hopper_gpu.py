"""The warp-specialised kernels against dense float64, and that dispatch reaches them."""

import pytest
import torch

from sparsify.kernels import dispatch
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
TALL = [
    Case(1000, 512, 768, (128, 16), 0.3),
    Case(77, 1000, 904, (256, 16), 0.25, empty_row=True),
    Case(333, 384, 520, (128, 32), 0.5),
    Case(4096, 512, 512, (128, 32), 0.1, bias=False),
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
@pytest.mark.parametrize("case", TALL, ids=str)
def test_tall_blocks(case, dtype):
    _check(case, dtype, {"hopper_tall"})


@pytest.mark.parametrize("tokens", [1, 2, 16, 31])
@pytest.mark.parametrize("block", [(64, 64), (128, 16), (16, 16), (256, 256), (8, 32)], ids=str)
def test_decoding(tokens, block):
    _check(Case(tokens, 1000, 2056, block, 0.4, empty_row=True), torch.bfloat16, {"triton_decode"})


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
