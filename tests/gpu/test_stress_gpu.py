"""Properties of every compiled kernel: shapes, masks, dtypes, layouts, non-finite numbers, streams, gradients.

The checks are those of tests/kernels/test_stress.py. Compiling takes most of the time, and what is compiled depends on
block, dtype, and which sizes are divisible by 16: cases share these as far as they can.
"""

import random

import pytest
import torch
from torch.nn import functional as F

from sparsify.kernels import dispatch
from sparsify.kernels.linear import reference
from sparsify.kernels.linear.ops import Operand, block_sparse_gated, block_sparse_linear
from sparsify.kernels.storage import pack
from tests.kernels.oracle import PATTERNS, Case, assert_close, make
from tests.kernels.stress import LAYOUTS, TOKENS, check, check_containment, poisoned_memory

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# A square block, a tall one, and two that are too narrow for the copy engine's tiles.
BLOCKS = [(64, 64), (128, 16), (32, 32), (16, 16)]


def every_kernel(op, *operands):
    """Every kernel that takes the operands here, with its own choice of options."""
    names = dict.fromkeys(candidate.kernel for candidate in dispatch.candidates(op, *operands))
    return {name: dispatch.load(dispatch.Candidate(name), op) for name in names}


def special_kernels(op, *operands):
    """Every kernel but the portable ones, whose tiles the tests on the CPU cover."""
    return {k: f for k, f in every_kernel(op, *operands).items() if k != f"triton_{op}"}


def _sizes(block):
    """Sizes that need padding on both sides and that the copy engine takes; 8 times an odd number."""
    return 8 * (8 * block[0] // 8 + 1), 8 * (6 * block[1] // 8 + 1)


@pytest.mark.parametrize("block", [(64, 64), (128, 16)], ids=str)
def test_every_number_of_tokens(block):
    for tokens in TOKENS:
        check(special_kernels, Case(tokens, *_sizes(block), block, 0.4), torch.bfloat16, DEVICE)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_random_products(block):
    draw = random.Random(str(block))
    for _ in range(12):
        case = Case(
            tokens=draw.choice([7, 77, draw.randrange(65, 5000, 2)]),
            out_features=8 * draw.randrange(1, 150, 2),
            in_features=8 * draw.randrange(1, 150, 2),
            block=block,
            density=draw.choice([0.05, 0.3, 0.9]),
            empty_row=draw.random() < 0.3,
        )
        check(every_kernel, case, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("tokens", [7, 777])
def test_masks(block, tokens):
    sizes = _sizes(block)
    for pattern in PATTERNS:
        check(every_kernel, Case(tokens, *sizes, block, pattern=pattern), torch.bfloat16, DEVICE)
    for density in (0.0, 1.0):
        check(every_kernel, Case(tokens, *sizes, block, density), torch.bfloat16, DEVICE)


@pytest.mark.parametrize(
    ("dtype", "block"),
    [(torch.float16, (64, 64)), (torch.float32, (32, 32)), (torch.float64, (32, 32))],
    ids=str,
)
def test_dtypes(dtype, block):
    for tokens in (7, 777):
        names = check(every_kernel, Case(tokens, *_sizes(block), block, 0.4), dtype, DEVICE)
        assert (names == {"reference"}) == (dtype == torch.float64)


@pytest.fixture
def matmul():
    """torch's settings of matrix products, given back as they were."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_is_as_exact_as_asked_for(matmul):
    case = Case(777, *_sizes((64, 64)), (64, 64), 0.4)
    o = make(case, torch.float32, DEVICE)
    exact = F.linear(o.x.double(), o.weight.double(), o.bias.double())
    worst = {}
    for precision in ("ieee", "tf32"):
        matmul.fp32_precision = precision
        y = block_sparse_linear(o.x, o.values, o.bias, o.topo, case.out_features)
        dense = F.linear(o.x, o.weight, o.bias)
        worst[precision] = (y - exact).abs().max().item(), (dense - exact).abs().max().item()
    assert worst["ieee"][0] < 3 * worst["ieee"][1] + 1e-6
    # The tensor cores cut the last bits off where cuBLAS rounds, which may double the error.
    assert 10 * worst["ieee"][0] < worst["tf32"][0] < 4 * worst["tf32"][1], worst


@pytest.mark.parametrize("layout", ["misaligned", "rows_apart", "transposed", "one_row_expanded"])
def test_layouts(layout):
    for tokens, kernels in ((7, special_kernels), (777, every_kernel)):
        case = Case(tokens, *_sizes((64, 64)), (64, 64), 0.4)
        check(kernels, case, torch.bfloat16, DEVICE, arrange=LAYOUTS[layout])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("tokens", [7, 777])
def test_nan_and_infinity_stay_where_they_belong(block, tokens):
    check_containment(every_kernel, Case(tokens, *_sizes(block), block, 0.4), torch.bfloat16, DEVICE)


def _apply(y, activation):
    """An activation function by torch itself."""
    exact = {"": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
    return F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else exact[activation](y)


@pytest.mark.parametrize("block", [(64, 64), (32, 32)], ids=str)
@pytest.mark.parametrize("tokens", [7, 777])
@torch.no_grad()
def test_activations(block, tokens):
    case = Case(tokens, *_sizes(block), block, 0.4)
    o = make(case, torch.bfloat16, DEVICE)
    exact = F.linear(o.x.double(), o.weight.double(), o.bias.double())
    dense = F.linear(o.x, o.weight, o.bias)
    for activation in reference.ACTIVATIONS:
        with poisoned_memory():
            y = block_sparse_linear(o.x, o.values, o.bias, o.topo, case.out_features, activation)
        assert_close(y, _apply(exact, activation), _apply(dense, activation))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@torch.no_grad()
def test_gated_products(block):
    sizes = _sizes(block)
    for tokens in (1, 7, 33, 64, 777):
        gate, up = (
            make(Case(tokens, *sizes, block, 0.4, empty_row=e), torch.bfloat16, DEVICE) for e in (True, False)
        )
        operands = [Operand(o.values, o.bias, o.topo) for o in (gate, up)]
        arguments = (gate.x, *operands, sizes[0], "silu")
        with poisoned_memory():
            y, again = (block_sparse_gated(*arguments) for _ in range(2))
        assert torch.equal(y, again)
        exact, dense = (
            F.silu(F.linear(x, *(t.to(x.dtype) for t in (gate.weight, gate.bias))))
            * F.linear(x, *(t.to(x.dtype) for t in (up.weight, up.bias)))
            for x in (gate.x.double(), gate.x)
        )
        assert_close(y, exact, dense)


def _gradients(o, product, dtype=None):
    """Result, and gradients of activations, weight and bias, of one layer."""
    leaves = [t.detach().clone().requires_grad_() for t in (o.x, o.values, o.bias)]
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        y = product(*leaves)
    y.backward(o.dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16", "autocast"])
def test_gradients(block, mixed):
    case = Case(777, *_sizes(block), block, 0.4)
    o = make(case, torch.float32 if mixed else torch.bfloat16, DEVICE)
    low = [t.to(torch.bfloat16) for t in (o.x, o.weight, o.bias, o.dy)]
    x, weight, bias, dy = (t.double() for t in low)
    exact = [F.linear(x, weight, bias), dy @ weight, pack(dy.T @ x, o.mask), dy.sum(0)]
    dense = [F.linear(*low[:3]), low[3] @ low[1], pack(low[3].T @ low[0], o.mask), low[3].sum(0)]
    runs = [
        _gradients(
            o,
            lambda x, values, bias: block_sparse_linear(x, values, bias, o.topo, case.out_features),
            torch.bfloat16 if mixed else None,
        )
        for _ in range(3)
    ]
    for name, *results, exact_one, dense_one in zip(
        ("y", "dx", "dvalues", "dbias"), *runs, exact, dense, strict=True
    ):
        assert results[0].dtype == (torch.float32 if mixed and name != "y" else torch.bfloat16)
        assert all(torch.equal(results[0], other) for other in results[1:]), f"{name} differs from run to run"
        assert_close(results[0].to(torch.bfloat16), exact_one, dense_one)


def test_the_number_of_tokens_may_change_from_call_to_call():
    case = Case(3000, *_sizes((64, 64)), (64, 64), 0.4)
    o = make(case, torch.bfloat16, DEVICE)
    exact = F.linear(o.x.double(), o.weight.double(), o.bias.double())
    dense = F.linear(o.x, o.weight, o.bias)
    for tokens in (777, 7, 3000, 1, 128, 777, 2048, 31, 129, 7, 0, 513):
        y = block_sparse_linear(o.x[:tokens], o.values, o.bias, o.topo, case.out_features)
        assert y.shape == (tokens, case.out_features)
        if tokens:
            assert_close(y, exact[:tokens], dense[:tokens])


@pytest.mark.parametrize("tokens", [1, 777])
@torch.no_grad()
def test_weights_may_change_between_calls(tokens):
    """A kernel may fetch weights while the one before it still runs, but not weights that this one writes."""
    side = 2056
    o = make(Case(tokens, side, side, (64, 64), 0.4, bias=False), torch.bfloat16, DEVICE)
    values = [o.values.clone() for _ in range(3)]

    def chain():
        y = o.x
        for own in values:
            y = block_sparse_linear(y, own, None, o.topo, side)
        return y

    expected = chain().clone()
    for turn in range(30):
        own = values[turn % 3]
        (own if turn % 2 else own.data).neg_()  # the second way is not seen by autograd's version counter
        expected = -expected
        assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for own in values:
        own.neg_()
        expected = -expected
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("block", [(64, 64), (128, 16)], ids=str)
def test_two_streams_at_once(block):
    case = Case(777, *_sizes(block), block, 0.4)
    o = make(case, torch.bfloat16, DEVICE)
    values = o.values.clone().requires_grad_()

    def step(tokens):
        y = block_sparse_linear(o.x[:tokens], values, o.bias, o.topo, case.out_features)
        return y.detach(), *torch.autograd.grad(y, values, o.dy[:tokens])

    sizes = (7, 777, 16, 300)
    alone = {tokens: step(tokens) for tokens in sizes}
    torch.cuda.synchronize()
    streams, done = [torch.cuda.Stream() for _ in range(2)], []
    for turn in range(40):
        for stream, tokens in zip(streams, (sizes[turn % 4], sizes[(turn + 1) % 4]), strict=True):
            with torch.cuda.stream(stream):
                done.append((tokens, step(tokens)))
    torch.cuda.synchronize()
    for tokens, results in done:
        assert all(torch.equal(a, b) for a, b in zip(alone[tokens], results, strict=True))


@pytest.mark.parametrize("tokens", [1, 16])
def test_the_same_bits_whatever_else_runs(tokens):
    """The order of additions may not depend on which program comes first, where many share a row."""
    o = make(Case(tokens, 520, 8200, (64, 64), pattern="full_row"), torch.bfloat16, DEVICE)
    arguments = (o.x, o.values, o.bias, o.topo, 520)
    noise, side = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    for name, kernel in every_kernel("dsd", o.x, o.values, (64, 64), 520).items():
        first = kernel(*arguments)
        for _ in range(30):
            with torch.cuda.stream(side):
                noise @ noise
            assert torch.equal(first, kernel(*arguments)), name
    torch.cuda.synchronize()
