"""Healing packed blocks: gradients and optimizer state exist for stored blocks alone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import sparsify
from sparsify.layers.swap import sparse_modules


def storages() -> dict[int, int]:
    """Bytes of every tensor that is alive, by the address of its memory."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    grads = [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    alive = [tensor.untyped_storage() for tensor in [*found, *grads] if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in alive}


class Count(TrainerCallback):
    """Counts all tensors in the moment in which gradients and optimizer state are there together."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self.bytes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = kwargs["optimizer"]
        if state.global_step == 1:
            self.bytes = sum(storages().values())


def train(folder: Path, density: float | None) -> tuple[Any, Count, int]:
    """Two steps of AdamW; the model, the count of its training alone, and the bytes of its packed values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    before = sum(storages().values())
    model = transformers.LlamaForCausalLM(config)
    if density is not None:
        sparsify.prune(model, block="32x32", sparsity=1 - density, scope="layer")
    tokens = torch.randint(0, 64, (4, 8))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
    )
    count = Count()
    data = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[count]).train()
    count.bytes -= before
    return model, count, sum(module.weight.numel() for module in sparse_modules(model).values())


def test_memory_of_healing_is_that_of_dense_training_in_proportion_to_density(tmp_path: Path):
    dense, whole, _ = train(tmp_path, None)
    elements = sum(
        module.weight.numel()
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    del dense
    for density in (0.5, 0.125):
        model, count, stored = train(tmp_path, density)
        assert stored == pytest.approx(density * elements, rel=0.02)
        # Weight, gradient and two moments in float32; what is not stored takes nothing, and indices next to nothing.
        saved = 16 * (elements - stored)
        assert whole.bytes - count.bytes == pytest.approx(saved, rel=0.01)
        states = count.optimizer.state
        for module in sparse_modules(model).values():
            weight = module.get_parameter("weight")
            moments = [value for value in states[weight].values() if value.dim()]
            assert [tuple(value.shape) for value in moments] == [tuple(weight.shape)] * 2
        del model, count, states, module, weight, moments
