"""Masks on a model whose parameters are sharded over two processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparsify.blocks import BlockMask, BlockShape
from sparsify.masking import mask_gradients, mask_model, unmask
from tests.ranks import RANKS, run_ranks

SHAPES = {"0": (72, 40), "2": (24, 72)}


def rank_main() -> None:
    distributed.init_process_group("gloo")
    for masked_first in (True, False):
        check(distributed.get_rank(), masked_first)
    distributed.destroy_process_group()


def check(rank: int, masked_first: bool) -> None:
    """Each layer is a unit of its own, so that its hooks are those of FSDP too, before ours or after them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 72), nn.ReLU(), nn.Linear(72, 24))
    block = BlockShape(16, 8)
    masks = {name: BlockMask(torch.rand(block.grid(s)) > 0.5, s, block) for name, s in SHAPES.items()}
    whole = copy.deepcopy(model)
    mask_model(whole, masks)
    if masked_first:
        mask_model(model, masks)
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    if not masked_first:
        mask_model(model, masks)

    inputs = torch.randn(RANKS, 5, 40)
    model(inputs[rank]).square().sum().backward()
    whole(inputs).square().sum().div(RANKS).backward()  # ranks average their gradients
    for got, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), expected.grad)
    mask_gradients(model)
    mask_gradients(whole)
    for got, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), expected.grad)
    expected = whole.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor(), expected[name])
    unmask(model)
    unmask(whole)
    assert torch.equal(model[0].weight.full_tensor(), whole[0].weight)


@pytest.mark.slow
def test_masks_hold_on_sharded_parameters():
    run_ranks(__file__)


if __name__ == "__main__":
    rank_main()
