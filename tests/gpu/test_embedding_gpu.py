"""Block-sparse tables on a GPU, against the dense table in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify import BlockMask, BlockShape, BlockSparseEmbedding, TiedEmbedding

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [pytest.param((4096, 64), "16x16", id="whole"), pytest.param((5003, 50), "32x16", id="odd")],
)
def test_lookup_scores_and_gradients(shape: tuple[int, int], block: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parsed = BlockShape.parse(block)
    mask = BlockMask(torch.rand(parsed.grid(shape)) < 0.4, shape, parsed)
    dense = TiedEmbedding(*shape, padding_idx=2, dtype=dtype)
    sparse = BlockSparseEmbedding.from_embedding(dense, mask).cuda()
    exact = dense.double()
    with torch.no_grad():
        exact.weight.mul_(mask.elements())
    ids = torch.randint(shape[0], (8, 33))
    ids[0, :4] = 2
    assert torch.equal(sparse(ids.cuda()).double().cpu(), exact(ids))

    x, dy = torch.randn(7, shape[1], dtype=dtype), torch.randn(8, 33, shape[1], dtype=dtype)
    scores = sparse(x.cuda()).double().cpu()
    bound = 2 * torch.finfo(dtype if dtype != torch.float32 else torch.bfloat16).eps
    wanted = exact(x.double())
    assert (scores - wanted).norm() <= bound * wanted.norm()

    got = torch.autograd.grad(sparse(ids.cuda()), sparse.weight, dy.cuda())[0]
    expected = torch.autograd.grad(exact(ids), exact.weight, dy.double())[0] * mask.elements()
    sparse.weight = nn.Parameter(got)
    found = sparse.dense_weight().double().cpu()
    assert (found - expected).norm() <= bound * expected.norm() and not found[2].any()


def test_a_replayed_graph_follows_new_ids() -> None:
    torch.manual_seed(0)
    sparse = BlockSparseEmbedding(1000, 64, "16x16").cuda()
    ids = torch.randint(1000, (4, 16), device="cuda")
    with torch.no_grad():
        sparse(ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = sparse(ids)
        ids.copy_(torch.randint(1000, (4, 16)))
        graph.replay()
        assert torch.equal(rows, sparse(ids))
