"""Packed weights whose stored blocks are sharded over two processes by FSDP2."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sparsify.blocks import BlockMask, BlockShape
from sparsify.layers.linear import BlockSparseLinear
from sparsify.training.sharding import freeze_empty, is_sharded
from tests.ranks import RANKS, run_ranks


def layers() -> nn.Module:
    """No block, one block and an odd number of them: fewer than processes, or not a multiple."""
    shape, block = (40, 40), BlockShape(16, 8)
    kept = torch.zeros(3, *block.grid(shape), dtype=torch.bool)
    kept[1, 1, 2] = kept[2, 0, 1:4] = kept[2, 2, 0] = kept[2, 2, 3] = True
    masks = [BlockMask(keep, shape, block) for keep in kept]
    parts = [
        BlockSparseLinear(40, 40, block, mask, bias=bias)
        for mask, bias in zip(masks, (True, True, False), strict=True)
    ]
    return nn.Sequential(*parts, nn.Linear(40, 4))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    import sparsify

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True, tie_word_embeddings=True))
    sparsify.prune(model, block="16x16", sparsity=0.7)
    return model


MODELS = {"layers": layers, "llama": llama}


def shard(model: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    freeze_empty(model)
    inner = model if isinstance(model, nn.Sequential) else model.get_submodule("model.layers")
    for module in (*inner.children(), model):
        if next(module.parameters(recurse=True), None) is not None:
            fully_shard(module, mesh=mesh, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert all(is_sharded(parameter) for parameter in model.parameters())
    return model


def loss(model: nn.Module, x: Tensor) -> Tensor:
    if x.is_floating_point():
        return model(x).float().square().mean()
    return model(input_ids=x, labels=x).loss


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def train(model: nn.Module, alone: nn.Module, batches: Tensor, rank: int, tolerance: float) -> None:
    """Steps of AdamW: in shards each process sees one batch, alone one sees them all."""
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, alone)]
    for _ in range(3):
        loss(model, batches[rank]).backward()
        (torch.stack([loss(alone, batch) for batch in batches]).mean()).backward()
        for (name, got), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            if expected.numel():
                assert got.grad is not None and expected.grad is not None, name
                torch.testing.assert_close(whole(got.grad), expected.grad, rtol=0, atol=tolerance, msg=name)
        norms = [torch.nn.utils.clip_grad_norm_(each.parameters(), 0.5) for each in (model, alone)]
        torch.testing.assert_close(whole(norms[0]), norms[1], rtol=0.01, atol=tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def rank_main(case: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    model = MODELS[case]()
    batches = torch.randn(RANKS, 7, 40) if case == "layers" else torch.randint(0, 64, (RANKS, 3, 12))
    if case == "layers":
        mixed = shard(copy.deepcopy(model), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        train(mixed, copy.deepcopy(model), batches, rank, 0.02)
    alone = copy.deepcopy(model)
    shard(model)
    train(model, alone, batches, rank, 1e-5)
    options = StateDictOptions(full_state_dict=True)
    stored: Any = copy.deepcopy(get_model_state_dict(model, options=options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_model_state_dict(model, stored, options=options)
    expected = alone.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(whole(tensor), expected[name], rtol=0, atol=1e-4, msg=name)
    for name, module in alone.named_modules():
        if isinstance(module, BlockSparseLinear):
            dense = model.get_submodule(name).dense_weight()  # pyright: ignore[reportCallIssue]
            torch.testing.assert_close(dense, module.dense_weight(), rtol=0, atol=1e-4)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_sharded_blocks_train_as_whole_ones(case: str):
    run_ranks(__file__, case)


if __name__ == "__main__":
    rank_main(sys.argv[1])
