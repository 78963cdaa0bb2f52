"""Packing is lossless, the derived topology is right, and damaged indices are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import CheckpointError
from sparsify.kernels.storage import pack, topology, unpack, validate_indices

SIDES = st.sampled_from([8, 16, 32, 64])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@given(st.integers(1, 150), st.integers(1, 150), SIDES, SIDES, st.floats(0, 1), DTYPES)
def test_pack_and_unpack_keep_every_kept_bit(n, k, bo, bi, share, dtype):
    block = BlockShape(bo, bi)
    mask = BlockMask(torch.rand(block.grid((n, k))) < share, (n, k), block)
    weight = torch.randn(n, k).to(dtype)
    values = pack(weight, mask)
    assert values.is_contiguous() and tuple(values.shape) == (mask.blocks_kept, bi, bo)
    dense = unpack(values, *mask.csr(), (n, k))
    assert dense.dtype == dtype and torch.equal(dense, weight * mask.elements())
    assert torch.equal(pack(dense, mask), values)


def test_a_block_row_is_one_contiguous_panel():
    weight, block = torch.arange(16 * 24.0).view(16, 24), BlockShape(16, 8)
    values = pack(weight, BlockMask(torch.tensor([[True, False, True]]), (16, 24), block))
    panel = values.flatten(0, 1)  # [nnz * bi, bo]
    assert torch.equal(panel, torch.cat([weight[:, :8], weight[:, 16:]], 1).T)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_topology_lists_the_same_blocks_by_column(rows, cols, share):
    block = BlockShape(8, 8)
    mask = BlockMask(torch.rand(rows, cols) < share, (rows * 8, cols * 8), block)
    topo = topology(*mask.csr(), cols)
    assert all(index.dtype == torch.int32 for index in topo)
    assert topo.row.tolist() == mask.keep.nonzero()[:, 0].tolist()
    by_column = mask.keep.T.nonzero()
    assert topo.t_row.tolist() == by_column[:, 1].tolist()
    assert topo.col[topo.t_block.long()].tolist() == by_column[:, 0].tolist()
    assert topo.row[topo.t_block.long()].tolist() == topo.t_row.tolist()
    assert topo.t_crow.diff().tolist() == mask.keep.sum(0).tolist()


CROW, COL = [0, 2, 2, 3], [0, 3, 1]


@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        pytest.param([0, 2, 2], COL, "expected 4 row pointers", id="too few row pointers"),
        pytest.param(CROW, [0, 3], "expected 4 row pointers and 3 columns", id="too few columns"),
        pytest.param([0, 2, 1, 3], COL, "row pointers must rise", id="falling"),
        pytest.param([1, 2, 2, 3], COL, "row pointers must rise", id="not from zero"),
        pytest.param([0, 2, 2, 9], COL, "row pointers must rise from 0 to 3", id="beyond the end"),
        pytest.param(CROW, [0, 4, 1], r"must lie in 0\.\.3, found 0\.\.4", id="column too large"),
        pytest.param(CROW, [-1, 3, 1], r"must lie in 0\.\.3, found -1", id="negative column"),
        pytest.param(CROW, [3, 0, 1], "must ascend", id="unsorted"),
        pytest.param(CROW, [3, 3, 1], "without repeats", id="repeated"),
    ],
)
def test_damaged_indices_are_refused(crow, col, message):
    tensors = torch.tensor(crow, dtype=torch.int32), torch.tensor(col, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=message) as caught:
        validate_indices(*tensors, (3, 4), 3, "model.up_proj")
    assert "model.up_proj" in str(caught.value)


def test_sound_indices_pass_and_wide_ones_do_not():
    crow, col = torch.tensor(CROW, dtype=torch.int32), torch.tensor(COL, dtype=torch.int32)
    validate_indices(crow, col, (3, 4), 3)
    with pytest.raises(CheckpointError, match="must be int32"):
        validate_indices(crow.long(), col, (3, 4), 3)
