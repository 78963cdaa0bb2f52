"""Pruning while training on two processes: masks are the same on both, and those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import ConfigError
from sparsify.layers.swap import masks_of
from sparsify.masking import load_masks, save_masks, unmask
from sparsify.pruner import create_pruner
from sparsify.targets import select
from sparsify.training.pruning_callback import PruningCallback
from sparsify.training.sharding import gathered
from sparsify.training.sparsify_loop import SparsifyLoop

RANKS, STEPS, BATCH = 2, 20, 8
BLOCK = BlockShape(8, 8)
PRUNERS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "group_lasso": {},
    "movement": {"warmup": 0.0, "settle": 0.3},
    "prune_and_grow": {"every": 0.1, "ramp": 0.3},
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def tokens() -> torch.Tensor:
    return torch.randint(0, 32, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(1))


class Watch(PruningCallback):
    """Counts how often the masks have changed on the way."""

    changes = 0

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        modules = list(kwargs["model"].modules())
        before = [module._buffers.get("weight_keep") for module in modules]
        super().on_optimizer_step(args, state, control, **kwargs)
        after = [module._buffers.get("weight_keep") for module in modules]
        changed = any(one is not other for one, other in zip(before, after, strict=True))
        self.changes += changed and self.masks is None


def make_callback(model: nn.Module, method: str) -> Watch:
    pruner = create_pruner(method, **PRUNERS[method])
    return Watch(pruner, select(model, BLOCK).layers, Budget(0.6), until=0.8, start=0.2)


def train_with_trainer(method: str, folder: Path, batch: int) -> tuple[nn.Module, Watch]:
    """Under torchrun's environment the Trainer puts the model into DistributedDataParallel."""
    model = make_model()
    callback = make_callback(model, method)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    if "RANK" in os.environ:
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return model, callback


def train_sharded(method: str, mesh: Any) -> tuple[nn.Module, Watch]:
    """The Trainer's order of events in a loop of our own; accelerate shards with FSDP2 on GPUs alone."""
    model = make_model()
    callback = make_callback(model, method)
    if mesh is not None:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state: Any = SimpleNamespace(global_step=0, max_steps=STEPS, is_world_process_zero=True)
    told: Any = {"args": None, "state": state, "control": None, "model": model}
    callback.on_train_begin(**told)
    for batch in tokens().split(
        BATCH
    ):  # the same on both ranks, so that the mean gradient is bit for bit one's own
        callback.on_step_begin(**told)
        model(input_ids=batch, labels=batch).loss.backward()
        callback.on_pre_optimizer_step(**told)
        optimizer.step()
        callback.on_optimizer_step(**told)
        optimizer.zero_grad()
        state.global_step += 1
    return model, callback


def train_plainly(mesh: Any) -> tuple[nn.Module, dict[str, BlockMask]]:
    """The six lines of docs/pruners.md, with the weights gathered where they are sharded."""
    model = make_model()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = tokens().split(BATCH)
    pruner, layers, budget = create_pruner("group_lasso"), select(model, BLOCK).layers, Budget(0.6)
    with gathered(layers):
        pruner.begin(layers, budget)
    for step, batch in enumerate(batches):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
        with gathered(layers, write=True):
            pruner.after_step(layers, (step + 1) / len(batches))
    with gathered(layers):
        return model, budget.masks({layer.name: pruner.score(layer) for layer in layers}, layers)


def rank_main(mode: str, rank: int, folder: Path) -> None:
    if mode == "ddp":
        for method in PRUNERS:
            model, callback = train_with_trainer(method, folder / f"{method}-trainer", BATCH // RANKS)
            assert callback.masks is not None
            save_masks(folder / f"{method}-{rank}.safetensors", callback.masks)
            print(method, callback.changes)
        return
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for method in PRUNERS:
        model, callback = train_sharded(method, mesh)
        whole, alone = train_sharded(method, None)
        assert callback.masks is not None and alone.masks is not None
        for name, mask in alone.masks.items():
            assert torch.equal(mask.keep, callback.masks[name].keep), (method, name)
        unmask(model)
        unmask(whole)
        for got, expected in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(got.full_tensor(), expected)
        save_masks(folder / f"{method}-{rank}.safetensors", callback.masks)
        print(method, callback.changes)
    model, masks = train_plainly(mesh)
    whole, expected_masks = train_plainly(None)
    assert all(torch.equal(mask.keep, expected_masks[name].keep) for name, mask in masks.items())
    for got, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got.full_tensor(), expected)
    for kind in ("ddp", "fsdp2"):
        check_own_loops(kind, mesh)
    distributed.destroy_process_group()


def run_ranks(mode: str, folder: Path) -> list[dict[str, dict[str, BlockMask]]]:
    """Masks by pruner and layer, of each rank."""
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    if mode == "ddp":
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    ranks = []
    for rank in range(RANKS):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if mode == "ddp" else {}
        ranks.append(
            subprocess.Popen(
                [sys.executable, __file__, mode, str(rank), str(folder)],
                env={**environment, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for rank in ranks:
            said, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors
            changes = dict(
                line.split() for line in said.splitlines() if line.split()[:1] and line.split()[0] in PRUNERS
            )
            assert int(changes["group_lasso"]) == 0
            assert int(changes["movement"]) > 2 and int(changes["prune_and_grow"]) > 2
    finally:
        for rank in ranks:
            rank.kill()
    return [
        {method: load_masks(folder / f"{method}-{rank}.safetensors") for method in PRUNERS}
        for rank in range(RANKS)
    ]


def train_own_loop(kind: str | None, mesh: Any) -> tuple[nn.Module, SparsifyLoop]:
    """A loop of one's own, in shards (`fsdp2`), under DDP (`ddp`), or alone; each step has two parts."""
    model: Any = make_model()
    plain = model
    if kind == "fsdp2":
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loop = SparsifyLoop(model, optimizer, steps=STEPS, block="8x8", sparsity=0.6, until=0.8, start=0.2)
    for batch in tokens().split(BATCH):
        for part in batch.split(BATCH // 2):
            (model(input_ids=part, labels=part).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain, loop


def check_own_loops(kind: str, mesh: Any) -> None:
    """On the same data the mask of both ranks is that of one process, bit for bit, and no weight is beside it."""
    (model, loop), (_, alone) = train_own_loop(kind, mesh), train_own_loop(None, None)
    assert loop.masks is not None and alone.masks is not None
    for layer in loop.layers:
        mask = loop.masks[layer.name]
        assert torch.equal(mask.keep, alone.masks[layer.name].keep), layer.name
        seen = model.state_dict()[f"{layer.name}.weight"]
        whole = seen.full_tensor() if hasattr(seen, "full_tensor") else seen
        assert torch.equal(whole != 0, mask.elements()), layer.name
    if kind == "fsdp2":
        with pytest.raises(ConfigError, match="the weights are sharded: save the model"):
            loop.finish()
    else:
        masks = loop.finish()
        assert masks_of(model).keys() == masks.keys()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_masks_are_the_same_on_all_ranks_and_those_of_one_process(mode: str, tmp_path: Path):
    first, second = run_ranks(mode, tmp_path)
    for method, masks in first.items():
        for name, mask in masks.items():
            assert torch.equal(mask.keep, second[method][name].keep), (method, name)
        kept = sum(mask.elements_kept for mask in masks.values())
        elements = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
        assert abs(kept - 0.4 * elements) <= BLOCK.numel / 2
        if (
            mode == "ddp"
        ):  # sums of gradients are rounded in another order, and a close race may end otherwise
            _, alone = train_with_trainer(method, tmp_path / "alone", BATCH)
            assert alone.masks is not None
            same = sum(int((mask.keep == alone.masks[name].keep).sum()) for name, mask in masks.items())
            assert same >= 0.97 * sum(mask.keep.numel() for mask in masks.values())


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
