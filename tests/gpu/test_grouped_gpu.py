"""The compiled grouped products on a GPU, at the sizes of the CPU tests and at real ones, and experts as a whole."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from sparsify import BlockMask, BlockShape
from sparsify.layers import kinds
from tests.kernels.grouped_oracle import CASES, Case, check_activated, check_products, make
from tests.kernels.oracle import DTYPES, assert_close

pytestmark = pytest.mark.gpu

LARGE = [
    Case(512, 8, 128, 384, 512, (64, 64), 0.25, bias=False),
    Case(1000, 2, 8, 1000, 904, (64, 64), 0.5, routing="none"),  # padded on both sides
    Case(300, 2, 8, 512, 640, (128, 128), 0.3, routing="few"),
    Case(500, 4, 9, 512, 768, (128, 16), 0.25),
    Case(400, 1, 4, 512, 512, (256, 64), 0.4, routing="one"),
    Case(1, 8, 128, 1536, 2048, (64, 64), 0.25, bias=False),  # decoding
    Case(16, 8, 128, 384, 512, (64, 64), 0.25),
    Case(16, 2, 8, 2048, 1024, (128, 128), 0.25),
    Case(3, 2, 8, 512, 1024, (32, 32), 0.1),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Free memory of the allocator is NaN, so that unwritten outputs show."""
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_products(case, dtype):
    from sparsify.kernels.grouped import triton_grouped as kernels

    check_products(case, dtype, kernels.grouped, kernels.grouped_dx, kernels.grouped_dw, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_what_follows_the_product(case, dtype):
    from sparsify.kernels.grouped.triton_grouped import grouped

    check_activated(case, dtype, grouped, "silu", F.silu, "cuda")


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
HOPPER = [
    Case(512, 8, 128, 384, 512, (64, 64), 0.25, bias=False),
    Case(1000, 2, 8, 1000, 904, (64, 64), 0.5, routing="none", bias=False),  # padded on both sides
    Case(300, 2, 8, 512, 640, (128, 128), 0.3, routing="few", bias=False),
    Case(400, 1, 4, 640, 512, (256, 64), 0.4, routing="one", bias=False),
    Case(333, 2, 5, 320, 512, (64, 128), 0.2, bias=False),  # an odd number of block rows
    Case(2000, 2, 8, 1024, 2048, (64, 64), 0.25, bias=False),
    Case(3, 2, 4, 256, 256, (64, 64), 0.5, bias=False),
]


@needs_hopper
@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_hopper_kernel(case, dtype, tile):
    from sparsify.kernels.grouped import hopper_grouped, triton_grouped

    grouped, grouped_dx = (
        partial(product, tile=tile) for product in (hopper_grouped.grouped, hopper_grouped.grouped_dx)
    )
    check_products(case, dtype, grouped, grouped_dx, triton_grouped.grouped_dw, "cuda")
    check_activated(case, dtype, grouped, "silu", F.silu, "cuda")


@needs_hopper
def test_many_slots_take_the_hopper_kernel():
    from sparsify.kernels.dispatch import choose_grouped

    o = make(Case(2048, 2, 8, 256, 256, (64, 64), bias=False), torch.bfloat16, "cuda")
    for op, operand in (("grouped", o.x), ("grouped_dx", o.dy)):
        chosen = choose_grouped(op, operand, o.values, None, o.groups, 256)
        assert chosen.__module__.endswith("hopper_grouped")


@pytest.mark.parametrize("slots", [1, 7, 128, 1000, 40_000])
@pytest.mark.parametrize("count", [1, 8, 128, 300])
def test_slots_are_sorted_by_expert(slots, count):
    from sparsify.kernels.grouped.triton_grouped import group

    experts = torch.randint(count + 1, (slots,), device="cuda")
    order, offsets = group(experts, count)
    assert torch.equal(order.long(), torch.argsort(experts, stable=True))
    assert torch.equal(
        offsets.long(), torch.searchsorted(experts.sort().values, torch.arange(count + 1).cuda())
    )


def test_the_same_from_run_to_run():
    from sparsify.kernels.grouped import triton_grouped as kernels

    o = make(LARGE[1], torch.bfloat16, "cuda")
    for run in (
        lambda: kernels.grouped(o.x, o.values, o.bias, o.topo, o.groups, 1000),
        lambda: kernels.grouped_dx(o.dy, o.values, o.topo, o.groups, 904),
        lambda: kernels.grouped_dw(o.dy, o.x, o.topo, o.groups, 64, 64),
    ):
        assert torch.equal(run(), run())


def _experts(kind, dtype):
    """Dense experts, zero outside their masks, and their block-sparse equivalent."""
    if kind == "qwen3":
        config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=256, num_experts=32)
        dense, top = Qwen3MoeExperts(config), 4
    else:
        config = MixtralConfig(hidden_size=512, intermediate_size=1024, num_local_experts=8)
        dense, top = MixtralExperts(config), 2
    config._experts_implementation = "eager"
    dense = dense.cuda()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    masks = {}
    for layer in kinds.matrices("experts", dense, BlockShape(64, 64)):
        masks[layer.name] = BlockMask(torch.rand(layer.grid) < 0.3, layer.shape, layer.block)
        layer.weight.mul_(masks[layer.name].elements().cuda())
    dense.to(dtype)
    return dense, kinds.to_sparse("experts", copy.deepcopy(dense), masks), top


def _inputs(sparse, top, tokens, dtype):
    index = torch.rand(tokens, sparse.num_experts, device="cuda").topk(top).indices
    weights = torch.rand(tokens, top, device="cuda").to(dtype)
    return torch.randn(tokens, 512, device="cuda").to(dtype), index, weights


@pytest.mark.parametrize("tokens", [1, 16, 700, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_experts_equal_dense_ones(kind, dtype, tokens):
    dense, sparse, top = _experts(kind, dtype)
    inputs = _inputs(sparse, top, tokens, dtype)
    with torch.no_grad():
        hidden, index, weights = inputs
        exact = copy.deepcopy(dense).double()(hidden.double(), index, weights.double())
        assert_close(sparse(*inputs), exact, dense(*inputs))
    assert_close(sparse(*inputs).detach(), exact, dense(*inputs).detach())


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_experts_train_as_dense_ones(kind):
    dense, sparse, top = _experts(kind, torch.float32)
    hidden, index, weights = _inputs(sparse, top, 500, torch.float32)
    grads = []
    for module in (dense, sparse):
        x = hidden.clone().requires_grad_()
        module(x, index, weights).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)
    for name in sparse.packed:
        gradient = copy.deepcopy(sparse)
        gradient.get_parameter(name).data.copy_(sparse.get_parameter(name).grad)
        kept = sparse.dense_parameter(name) != 0
        expected = dense.get_parameter(name).grad * kept
        torch.testing.assert_close(gradient.dense_parameter(name) * kept, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 16, 700, 5000])
def test_replays_with_another_routing_as_a_cuda_graph(tokens):
    _, sparse, top = _experts("qwen3", torch.bfloat16)
    inputs = _inputs(sparse, top, tokens, torch.bfloat16)
    with torch.no_grad():
        sparse(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sparse(*inputs)
        for mine, other in zip(inputs, _inputs(sparse, top, tokens, torch.bfloat16), strict=True):
            mine.copy_(other)
        graph.replay()
        assert torch.equal(y, sparse(*inputs))


@pytest.mark.parametrize("tokens", [600, 3000])
def test_nothing_waits_for_the_gpu(tokens):
    _, sparse, top = _experts("mixtral", torch.bfloat16)
    inputs = _inputs(sparse, top, tokens, torch.bfloat16)
    sparse(*inputs).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse(*inputs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_whole():
    _, sparse, top = _experts("mixtral", torch.bfloat16)
    inputs = _inputs(sparse, top, 64, torch.bfloat16)
    with torch.no_grad():
        y = torch.compile(sparse, fullgraph=True)(*inputs)
        torch.testing.assert_close(y, sparse(*inputs), rtol=0.02, atol=0.02)
