"""The pruner benchmark's own parts."""

from __future__ import annotations

import torch
from torch import nn

import bench_pruners
from sparsify.blocks import BlockMask, BlockShape


def test_frozen_weights_lose_their_blocks_and_nothing_else():
    model = nn.Sequential(nn.Linear(32, 16))
    dense = model[0].weight.detach().clone()
    mask = BlockMask(torch.eye(2, 4) == 0, (16, 32), BlockShape(8, 8))
    bench_pruners.remove(model, {"0": mask})
    assert torch.equal(model[0].weight, dense * mask.elements())


def test_the_table_has_a_row_for_each_case_and_a_column_for_each_method():
    rows = [
        {"block": block, "sparsity": sparsity, "method": method, "score": score}
        for block, sparsity in (("32x32", 0.5), ("32x32", 0.75))
        for method, score in (("magnitude", 70.04), ("wanda", 71.0))
    ]
    table = bench_pruners.as_markdown({"rows": rows}).splitlines()
    assert table[0] == "| block, out x in | removed | magnitude | wanda |"
    assert table[2] == "| 32x32 | 50% | 70.0 | 71.0 |" and len(table) == 4
