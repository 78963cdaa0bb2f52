"""Masks on a model whose parameters are sharded over two processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparsify.blocks import BlockMask, BlockShape
from sparsify.masking import mask_gradients, mask_model, unmask

RANKS = 2
SHAPES = {"0": (72, 40), "2": (24, 72)}


def rank_main(rank: int, rendezvous: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 72), nn.ReLU(), nn.Linear(72, 24))
    block = BlockShape(16, 8)
    masks = {name: BlockMask(torch.rand(block.grid(s)) > 0.5, s, block) for name, s in SHAPES.items()}
    mask_model(model, masks)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)

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
    distributed.destroy_process_group()


@pytest.mark.slow
def test_masks_hold_on_sharded_parameters(tmp_path: Path):
    # Processes of their own: a fork of this one could not run backward once any other test has.
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=60)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
