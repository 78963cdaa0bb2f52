"""The compiled convolutions on a GPU, at the sizes of the CPU tests and at real ones."""

import pytest
import torch
from torch import nn

from sparsify import BlockSparseConv2d
from tests.kernels.conv_oracle import CASES, Case, check_products
from tests.kernels.oracle import DTYPES

pytestmark = pytest.mark.gpu

LARGE = [
    Case((56, 56), (64, 64), (64, 64), per_position=True, density=0.25, batch=8),
    Case((28, 28), (256, 128), (64, 64), stride=(2, 2), density=0.5, batch=8),
    Case((14, 14), (256, 256), (128, 128), density=0.5, batch=16),
    Case((7, 7), (512, 512), (32, 32), density=0.1, batch=16, empty_row=True),
    Case((1, 500), (128, 192), (64, 32), kernel=(1, 9), padding=(0, 0, 4, 4), groups=2, batch=4),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Free memory of the allocator is NaN, so that unwritten outputs show."""
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_products(case, dtype):
    from sparsify.kernels.convolution import triton_conv

    check_products(case, dtype, triton_conv, device="cuda")


def _layers(kernel, stride, dtype):
    dense = nn.Conv2d(128, 192, kernel, stride, kernel // 2).to("cuda", dtype)
    dense = dense.to(memory_format=torch.channels_last)
    sparse = BlockSparseConv2d.from_conv(dense, torch.rand(3, 4) < 0.5, "64x32")
    return sparse, sparse.to_conv().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_layer_trains_as_the_dense_one(kernel, stride):
    sparse, dense = _layers(kernel, stride, torch.float64)
    x = torch.randn(4, 128, 19, 17, device="cuda", dtype=torch.float64).to(memory_format=torch.channels_last)
    expected = dense(x.requires_grad_())
    exact = torch.autograd.grad(expected.square().sum(), [x, dense.weight])
    sparse, single = sparse.bfloat16(), x.detach().bfloat16().requires_grad_()
    y = sparse(single)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)
    y.float().square().sum().backward()
    torch.testing.assert_close(single.grad.double(), exact[0], rtol=0.05, atol=0.05)
    keep = sparse.layout.stored(sparse.masks)
    packed = sparse.layout.pack(exact[1], keep, sparse.block_shape)
    error = (sparse.weight.grad.double() - packed).norm() / packed.norm()
    assert error < 0.02


def test_autocasts_compiles_and_replays_as_a_cuda_graph():
    sparse, dense = _layers(3, 1, torch.float32)
    x = torch.randn(4, 128, 20, 20, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16
    compiled = torch.compile(sparse, fullgraph=True)
    torch.testing.assert_close(compiled(x), dense(x), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        sparse(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sparse(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
    torch.testing.assert_close(y, sparse(x))


def test_no_buffer_of_patches():
    sparse, _ = _layers(3, 1, torch.bfloat16)
    x = torch.randn(16, 128, 56, 56, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    sparse(x).sum().backward()  # compiled by now
    x.grad, sparse.weight.grad = None, None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        y = sparse(x)
    output = y.numel() * y.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * output
    del y
    y = sparse(x)
    gradient = torch.ones_like(y)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.backward(gradient)
    # The input's gradient, and float32 parts of the weight's: 1024 blocks at the most.
    limit = x.numel() * x.element_size() + 1024 * 64 * 32 * 4 + sparse.weight.numel() * 8
    assert torch.cuda.max_memory_allocated() - before < 1.1 * limit


def test_both_forms_are_timed_to_choose():
    from sparsify.conv_speed import speedup

    dense = nn.Conv2d(512, 512, 3, padding=1)
    device = torch.device("cuda")
    few = BlockSparseConv2d.from_conv(dense, torch.rand(8, 8) < 0.1, "64x64")
    assert speedup(dense, few, device, torch.bfloat16) > 1
    small = BlockSparseConv2d.from_conv(dense, torch.ones(64, 64, dtype=torch.bool), "8x8")
    assert speedup(dense, small, device, torch.bfloat16) < 1
