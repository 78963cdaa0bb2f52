"""Block shapes, masks and the padding between them and a weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.blocks import BlockMask, BlockShape, block_sizes, from_blocks, to_blocks
from sparsify.errors import BlockShapeError, SparsifyError

SIDES = st.sampled_from([8, 16, 32, 64])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("64x64", (64, 64)),
        ("128x16", (128, 16)),
        ("8X256", (8, 256)),
        (32, (32, 32)),
        ((16, 8), (16, 8)),
        ("64", (64, 64)),
    ],
)
def test_parse_reads_every_form(value, expected):
    block = BlockShape.parse(value)
    assert (block.rows, block.cols) == expected
    assert BlockShape.parse(str(block)) == block == BlockShape.parse(block)


@pytest.mark.parametrize(
    "value", ["0", 0, 48, "48x48", "3x5", "512", 4, "64x64x64", "", "axb", 64.0, True, None, "-8", ()]
)
def test_parse_refuses_what_no_kernel_supports(value):
    with pytest.raises(BlockShapeError, match=r"block shape") as caught:
        BlockShape.parse(value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, SparsifyError)
    assert "64x64" in str(caught.value)  # the message shows how to write it


@given(st.integers(1, 150), st.integers(1, 150), SIDES, SIDES)
def test_blocks_round_trip_and_pad_with_zeros(n, k, bo, bi):
    weight, block = torch.randn(n, k), BlockShape(bo, bi)
    blocks = to_blocks(weight, block)
    assert tuple(blocks.shape) == (*block.grid((n, k)), bo, bi)
    assert torch.equal(from_blocks(blocks, (n, k)), weight)
    assert blocks.count_nonzero() == weight.count_nonzero()
    assert torch.equal(block_sizes((n, k), block), to_blocks(torch.ones(n, k), block).sum((2, 3)).long())


@given(st.integers(1, 150), st.integers(1, 150), SIDES, SIDES, st.floats(0, 1))
def test_mask_counts_the_weights_own_elements_and_survives_csr(n, k, bo, bi, share):
    block = BlockShape(bo, bi)
    mask = BlockMask(torch.rand(block.grid((n, k))) < share, (n, k), block)
    assert mask.elements_kept == int(mask.elements().sum())
    assert mask.density == pytest.approx(mask.elements().float().mean().item(), abs=1e-6)
    crow, col = mask.csr()
    assert crow.dtype == col.dtype == torch.int32 and len(col) == mask.blocks_kept
    assert torch.equal(BlockMask.from_csr(crow, col, (n, k), block).keep, mask.keep)


def test_mask_of_the_wrong_grid_is_refused():
    with pytest.raises(BlockShapeError, match=r"needs a \(2, 3\) torch.bool mask"):
        BlockMask(torch.ones(2, 2, dtype=torch.bool), (64, 96), BlockShape(32, 32))
    with pytest.raises(BlockShapeError, match=r"torch.float32"):
        BlockMask(torch.ones(2, 3), (64, 96), BlockShape(32, 32))
