"""The compiled kernels on a GPU, at the sizes of the CPU tests and at real ones."""

import gc

import pytest
import torch

from sparsify import BlockMask, BlockShape, BlockSparseLinear
from tests.kernels.oracle import CASES, DTYPES, Case, check_products

pytestmark = pytest.mark.gpu

LARGE = [
    Case(1, 4096, 4096, (64, 64), 0.25),
    Case(1000, 1536, 2048, (128, 128), 0.3),
    Case(777, 2048, 1000, (128, 16), 0.2, empty_row=True),
    Case(512, 1000, 1536, (32, 32), 0.1),
]


def _nan_poisoned(function):
    """Runs a product after filling the allocator's free memory with NaN, so that unwritten outputs show."""

    def run(*args):
        poison = torch.full((1 << 22,), float("nan"), device="cuda")
        del poison
        return function(*args)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_products(case, dtype):
    from sparsify.kernels.linear import triton_dds, triton_dsd, triton_sdd

    products = (_nan_poisoned(p) for p in (triton_dsd.dsd, triton_dds.dds, triton_sdd.sdd))
    check_products(case, dtype, *products, device="cuda")


def _layer(dtype=torch.bfloat16):
    block, shape = BlockShape(64, 32), (512, 384)
    mask = BlockMask(torch.rand(block.grid(shape)) < 0.3, shape, block)
    return BlockSparseLinear.from_linear(torch.nn.Linear(384, 512).to("cuda", dtype), mask)


def test_layer_moves_trains_and_autocasts():
    layer = _layer(torch.float32)
    x = torch.randn(100, 384, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer.to_linear()(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()
    back = layer.cpu()
    torch.testing.assert_close(back(x.cpu()), back.to_linear()(x.cpu()))


def test_compiles_whole_and_replays_as_a_cuda_graph():
    layer = _layer()
    x = torch.randn(16, 384, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=0.02, atol=0.02)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, layer(x))


def _peak_of_a_training_step(make_layer):
    gc.collect()
    before = torch.cuda.memory_allocated()
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters())
    x = torch.randn(64, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    layer(x).sum().backward()
    optimizer.step()
    return torch.cuda.max_memory_allocated() - before


def test_training_memory_is_proportional_to_density():
    shape, block = (8192, 8192), BlockShape(128, 128)
    mask = BlockMask(torch.rand(block.grid(shape)) < 0.1, shape, block)
    options = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
    sparse = _peak_of_a_training_step(lambda: BlockSparseLinear(8192, 8192, block, mask=mask, **options))
    dense = _peak_of_a_training_step(lambda: torch.nn.Linear(8192, 8192, **options))
    assert sparse < 1.2 * mask.density * dense
