"""A model in main memory is pruned on the GPU one transformer block at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import sparsify

pytestmark = pytest.mark.gpu


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("reconstruct", [0, 3])
def test_memory_is_that_of_a_block_and_weights_are_those_of_the_whole(reconstruct):
    dense = llama()
    batches = [{"input_ids": torch.randint(0, 256, (2, 64))} for _ in range(8)]
    given = {"method": "block_obs", "block": 64, "sparsity": 0.5, "calibration": batches, "convert": False}
    whole, offloaded = copy.deepcopy(dense).cuda(), copy.deepcopy(dense)
    expected = sparsify.prune(whole, **given, reconstruct=reconstruct)
    whole = whole.cpu()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = sparsify.prune(offloaded, **given, reconstruct=reconstruct, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    size = sum(p.nbytes for p in dense.parameters())
    assert peak < 0.9 * size, f"{peak / 1e6:.0f} MB on the GPU for a model of {size / 1e6:.0f} MB"
    assert {p.device.type for p in offloaded.parameters()} == {"cpu"}
    same = sum(bool((found.masks[n].keep == m.keep).all()) for n, m in expected.masks.items())
    assert same >= 0.9 * len(expected.masks)
    with torch.no_grad():
        outputs = [m(**batches[0]).logits for m in (dense, whole, offloaded)]
    errors = [float((o - outputs[0]).square().mean()) for o in outputs[1:]]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
