"""Convolutions that stay dense because both forms were timed."""

import pytest
import torch
from torch import nn

import sparsify
from sparsify import conv_speed
from sparsify.conv_speed import slower_convolutions, speedup
from sparsify.layers.convolution import BlockSparseConv1d, BlockSparseConv2d

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(conv_speed, "BATCH", 2)
    monkeypatch.setattr(conv_speed, "ROUNDS", 2)


def test_slower_ones_are_named_and_each_distinct_one_is_timed_once(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 64, 1),
        nn.Conv2d(64, 32, 3, groups=2),
        nn.Linear(8, 8),
    )
    before = [parameter.clone() for parameter in model.parameters()]
    result = sparsify.prune(model, block="8x8", sparsity=0.5, scope="layer", convert=False)
    timed = []

    def fake(dense, sparse, device, dtype):
        timed.append((type(dense), sparse.groups, dtype))
        return {(3, 1): 0.5, (1, 1): 2.0, (3, 2): 0.9}[sparse.kernel_size[0], sparse.groups]

    monkeypatch.setattr(conv_speed, "speedup", fake)
    masks = dict(result.masks)
    masks["1"] = masks["0"]
    pruned = [parameter.clone() for parameter in model.parameters()]
    slower = slower_convolutions(model, masks, CPU, torch.float16)
    assert slower == {
        "0": "measured 0.50x the speed of dense here",
        "1": "measured 0.50x the speed of dense here",
        "3.group.0": "measured 0.90x the speed of dense here",
        "3.group.1": "measured 0.90x the speed of dense here",
    }
    assert len(timed) == 3 and {dtype for *_, dtype in timed} == {torch.float16}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, pruned, strict=True))


def test_what_has_nothing_left_is_not_timed(monkeypatch):
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    monkeypatch.setattr(conv_speed, "speedup", lambda *_: 0.1)
    masks = sparsify.prune(model, block="8x8", sparsity=0.5, convert=False).masks
    assert slower_convolutions(model, masks, CPU, torch.float32)
    masks["0"].keep.zero_()
    masks["0"].__dict__.pop("blocks_kept", None)
    assert not slower_convolutions(model, masks, CPU, torch.float32)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_both_forms_are_timed_and_left_alone(kind, small):
    dense = kind(16, 32, 5, stride=2, dilation=3)
    weight = dense.weight.clone()
    sparse = {nn.Conv1d: BlockSparseConv1d, nn.Conv2d: BlockSparseConv2d}[kind](
        16, 32, 5, "8x8", stride=2, dilation=3
    )
    assert speedup(dense, sparse, CPU, torch.float64) > 0
    assert torch.equal(dense.weight, weight) and sparse.weight.dtype == torch.float32


def test_the_faster_form_is_told(small):
    """A convolution with hardly a block left is faster than the dense one, anywhere."""
    dense = nn.Conv2d(256, 256, 3, padding=1)
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[0, 0] = True
    sparse = BlockSparseConv2d.from_conv(dense, keep, "64x64")
    assert speedup(dense, sparse, CPU, torch.float32) > 1.5
