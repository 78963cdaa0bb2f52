"""Two GPUs: layers on each (`device_map`), a part of each layer on each, and weights in shards, against one."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify.kernels import schedule
from tests.ranks import RANKS, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
]
# Relative differences of bfloat16: of outputs, and of gradients through all layers.
BUDGET, GRADIENTS = 2e-2, 5e-2


def llama(device: str, block: str = "64x64") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    sparsify.prune(model, block=block, sparsity=0.6)
    return model.eval()


def tokens(device: str, *shape: int) -> Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(1)).to(device)


def close(got: Tensor, expected: Tensor, budget: float = BUDGET) -> None:
    difference = (got.float().cpu() - expected.float().cpu()).norm() / expected.float().cpu().norm()
    assert difference < budget, difference


@pytest.mark.parametrize("placed", ["balanced", "by layer", "within an MLP"])
@torch.no_grad()
def test_layers_on_two_gpus_compute_as_on_one(placed: str, tmp_path: Path):
    whole = llama("cuda:0")
    sparsify.save(whole, tmp_path / "sparse")
    device_map: Any = placed
    if placed != "balanced":
        leaves = [name for name, module in whole.named_modules() if name and not list(module.children())]
        apart = "up_proj" if placed == "within an MLP" else ".1."
        device_map = {name: int(apart in name or ".3." in name) for name in leaves}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", device_map=device_map, dtype=torch.bfloat16
    )
    assert {parameter.device.index for parameter in loaded.parameters()} == {0, 1}
    for shape in ((1, 1), (3, 1), (2, 70), (4, 256)):  # each takes other kernels
        x = tokens("cuda:0", *shape)
        close(loaded(input_ids=x).logits, whole(input_ids=x).logits)
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert loaded.generate(tokens("cuda:0", 1, 9), **given).shape == (1, 17)


def test_training_across_two_gpus(tmp_path: Path):
    whole = llama("cuda:0")
    sparsify.save(whole, tmp_path / "sparse")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", device_map="balanced", dtype=torch.bfloat16
    )
    x = tokens("cuda:0", 2, 128)
    losses = [model(input_ids=x, labels=x).loss for model in (loaded, whole)]
    close(*losses)
    for loss in losses:
        loss.backward()
    for (name, got), expected in zip(loaded.named_parameters(), whole.parameters(), strict=True):
        assert got.grad is not None, name
        close(got.grad, expected.grad, GRADIENTS)


@pytest.mark.parametrize("case", ["parallel", "graph", "sharded", "replicated"])
def test_two_ranks_are_as_one(case: str):
    run_ranks(__file__, case, timeout=300)


def parallel() -> None:
    device = f"cuda:{distributed.get_rank()}"
    for block in ("64x64", "128x128", "128x16", "16x16"):
        whole = llama(device, block)
        part = copy.deepcopy(whole)
        divided = sparsify.parallelize(part)
        assert not divided.whole, divided
        with torch.no_grad():
            for shape in ((1, 1), (3, 1), (2, 70), (4, 256)):
                x = tokens(device, *shape)
                close(part(input_ids=x).logits, whole(input_ids=x).logits)
        x = tokens(device, 2, 128)
        for model in (part, whole):
            model(input_ids=x, labels=x).loss.backward()
        close(part.model.norm.weight.grad, whole.model.norm.weight.grad, GRADIENTS)
        name = "model.layers.0.input_layernorm.weight"
        close(part.get_parameter(name).grad, whole.get_parameter(name).grad, GRADIENTS)


@torch.no_grad()
def graph() -> None:
    device = f"cuda:{distributed.get_rank()}"
    whole = llama(device)
    part, x = copy.deepcopy(whole), tokens(device, 4, 1)
    sparsify.parallelize(part)
    expected = whole(input_ids=x).logits
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            part(input_ids=x)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
        y = part(input_ids=x).logits
    for _ in range(3):
        y.zero_()
        recorded.replay()
        torch.cuda.synchronize()
        close(y, expected)


def sharded() -> None:
    rank = distributed.get_rank()
    device = f"cuda:{rank}"
    whole = llama(device)
    model = copy.deepcopy(whole)
    mesh = init_device_mesh("cuda", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = tokens(device, RANKS, 128)
    model(input_ids=x[rank : rank + 1], labels=x[rank : rank + 1]).loss.backward()
    whole(input_ids=x, labels=x).loss.backward()
    for (name, got), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert got.to_local().numel() <= 0.6 * max(expected.numel(), 1) + expected[:1].numel(), name
        close(got.grad.full_tensor(), expected.grad, GRADIENTS)


def replicated() -> None:
    rank = distributed.get_rank()
    device = f"cuda:{rank}"
    whole = llama(device)
    model = DistributedDataParallel(copy.deepcopy(whole), device_ids=[rank])
    x = tokens(device, RANKS, 128)
    made: list[set[int]] = []
    for _ in range(3):  # buffers are broadcast before each step, which is no reason to plan anew
        model.zero_grad()
        model(input_ids=x[rank : rank + 1], labels=x[rank : rank + 1]).loss.backward()
        made.append({id(lists) for _, lists in schedule._cache.values()})
    assert made[0] == made[1] == made[2]
    whole(input_ids=x, labels=x).loss.backward()
    for got, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert got.grad is not None and expected.grad is not None
        close(got.grad, expected.grad, GRADIENTS)


if __name__ == "__main__":
    import os

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    {"parallel": parallel, "graph": graph, "sharded": sharded, "replicated": replicated}[sys.argv[1]]()
    distributed.destroy_process_group()
