"""Models divided between two processes over gloo compute, train, load and save as whole ones."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM

import sparsify
from sparsify.errors import ConfigError
from sparsify.layers.fusion import FusedMlp
from sparsify.layers.linear import BlockSparseLinear
from sparsify.parallel.model import parallelize, whole_state
from sparsify.parallel.vocabulary import VocabularyEmbedding
from tests.ranks import RANKS, run_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 200,  # the last block is half of one
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "pad_token_id": 60,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen3": {"num_key_value_heads": 2},
    "dense": {"tie_word_embeddings": True},
}


def build(name: str) -> Any:
    import transformers

    family = {"llama": "Llama", "dense": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **MODELS[name]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    if name != "dense":
        sparsify.prune(model, block="16x16", sparsity=0.6)
    return model.eval()


def check_outputs(part: Any, whole: Any, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(part(input_ids=x).logits, whole(input_ids=x).logits, rtol=0, atol=1e-5)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(part.generate(x[:1], **given), whole.generate(x[:1], **given))


def same_state(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


def models() -> None:
    x = torch.randint(0, 100, (3, 12), generator=torch.Generator().manual_seed(0))  # the same on both
    for name in MODELS:
        whole = build(name)
        part = copy.deepcopy(whole)
        divided = parallelize(part)
        assert not divided.whole and len(divided.splits) == 16, divided
        stored = divided.stored
        assert max(stored) < 1.1 * sum(stored) / RANKS, "balanced"
        layers = [module for module in part.modules() if isinstance(module, BlockSparseLinear)]
        assert [layer.weight.shape[0] for layer in layers] == [
            int(layer.crow_indices[-1]) for layer in layers
        ]
        if name == "llama":
            assert all(isinstance(layer.mlp, FusedMlp) for layer in part.model.layers)
        embedding = part.get_input_embeddings()
        assert isinstance(embedding, VocabularyEmbedding)
        assert (embedding.weight is part.lm_head.weight) == MODELS[name].get("tie_word_embeddings", False)
        check_outputs(part, whole, x)
        check_outputs(copy.deepcopy(part), whole, x)
        same_state(whole_state(part), whole.state_dict())

        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (part, whole)]
        for _ in range(3):
            losses = [model(input_ids=x, labels=x).loss for model in (part, whole)]
            torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        same_state(whole_state(part), whole.state_dict(), atol=1e-5)
        with pytest.raises(ConfigError, match="is divided already"):
            parallelize(part)
        with pytest.raises(ConfigError, match=r"nothing in .* can be divided among 2 ranks"):
            parallelize(copy.deepcopy(whole), plan={})


def checkpoints(folder: Path) -> None:
    rank = distributed.get_rank()
    whole = build("llama")
    if rank == 0:
        sparsify.save(whole, folder / "whole")
    distributed.barrier()
    warnings.simplefilter("ignore")  # newer versions want a DistributedConfig for the plan
    x = torch.randint(0, 100, (3, 12))
    part: Any = AutoModelForCausalLM.from_pretrained(folder / "whole", tp_plan="auto")
    assert part._parallelism.ranks == RANKS and not part._parallelism.whole
    check_outputs(part, whole, x)
    part.save_pretrained(folder / "again")
    distributed.barrier()
    same_state(AutoModelForCausalLM.from_pretrained(folder / "again").state_dict(), whole.state_dict())
    described = [json.loads((folder / name / "config.json").read_text()) for name in ("whole", "again")]
    assert described[0]["quantization_config"]["layers"] == described[1]["quantization_config"]["layers"]

    with pytest.raises(ConfigError, match="divided by the model's own plan"):
        AutoModelForCausalLM.from_pretrained(
            folder / "whole", tp_plan={"model.layers.*.mlp.up_proj": "colwise"}
        )
    from transformers.distributed.configuration_utils import DistributedConfig

    sharded = AutoModelForCausalLM.from_pretrained(
        folder / "whole", distributed_config=DistributedConfig(fsdp_size=RANKS)
    )
    assert all(hasattr(parameter, "device_mesh") for parameter in sharded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(sharded(input_ids=x).logits, whole(input_ids=x).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["models", "checkpoints"])
def test_two_ranks_are_as_one(case: str, tmp_path: Path):
    run_ranks(__file__, case, str(tmp_path))


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    models() if sys.argv[1] == "models" else checkpoints(Path(sys.argv[2]))
    distributed.destroy_process_group()
