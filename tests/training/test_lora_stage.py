"""LoRA from a recipe: adapters alone are trained, and merged into stored blocks without changing an output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsify import pipeline
from sparsify.errors import ConfigError
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.swap import masks_of
from sparsify.recipe.schema import Recipe
from sparsify.recipe.training import Lora
from tests.cli import checkpoints
from tests.cli.checkpoints import digests
from tests.training.stops import Stop

lora = pytest.importorskip("sparsify.training.lora")
PRUNE = {"stage": "prune", "block": "32x32", "sparsity": 0.5}
TRAIN = {"stage": "finetune", "steps": 10, "batch": 4, "learning_rate": 1e-2, "lora": {"rank": 4}}


@pytest.fixture
def make(tmp_path: Path):
    def make(*stages: dict[str, Any], out: str = "out", dtype: torch.dtype = torch.float32) -> Recipe:
        if not (tmp_path / "dense").exists():
            checkpoints.llama(tmp_path / "dense", dtype)
        return Recipe.from_dict(
            {
                "version": 1,
                "model": str(tmp_path / "dense"),
                "out": str(tmp_path / out),
                "data": {"train": {"path": str(checkpoints.text(tmp_path)), "length": 32, "samples": 32}},
                "stages": [*stages, {"stage": "report"}],
            }
        )

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merged_logits_equal_unmerged_ones(make, tmp_path, dtype, monkeypatch):
    monkeypatch.setenv("SPARSIFY_FUSE", "0")  # a fused activation is rounded elsewhere than torch's own
    pipeline.run(make(PRUNE, {"stage": "convert"}, dtype=dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 45)[None]
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    masks = {name: mask.keep.clone() for name, mask in masks_of(model).items()}
    with lora.adapted(model, Lora(rank=4, targets=["q_proj", "re:layers.1.mlp"])) as wrapped:
        trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        assert trained and all(".lora_" in name for name in trained)
        assert {name.split(".lora_")[0].split("base_model.model.model.")[1] for name in trained} == {
            "layers.0.self_attn.q_proj",
            "layers.1.self_attn.q_proj",
            *(f"layers.1.mlp.{part}_proj" for part in ("up", "gate", "down")),
        }
        with torch.no_grad():
            before = model(ids).logits
            for name, parameter in wrapped.named_parameters():
                if name in trained:
                    parameter.normal_(std=0.1)
            unmerged = model(ids).logits
    with torch.no_grad():
        merged = model(ids).logits
    assert torch.equal(merged, unmerged)
    assert (merged - before).abs().max() > 1e-2
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needed
    assert {name: mask.keep.tolist() for name, mask in masks_of(model).items()} == {
        name: keep.tolist() for name, keep in masks.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_stage_trains_blocks_by_adapters_alone(make, tmp_path, dtype):
    result = pipeline.run(make(PRUNE, TRAIN, dtype=dtype))
    pipeline.run(make(PRUNE, {"stage": "convert", "dense_where_slower": "never"}, out="pruned"))
    assert result.report is not None
    losses = [point["loss"] for point in result.report["history"][0]["points"]]
    assert losses[-1] < losses[0]

    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert not [name for name in healed.state_dict() if "lora" in name or "base_layer" in name]
    assert not list((tmp_path / "out").glob("adapter*"))
    packed = {name for name, module in healed.named_modules() if isinstance(module, BlockSparseLinear)}
    before = pruned.state_dict()
    assert healed.state_dict().keys() == before.keys()
    for name, tensor in healed.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert changed == (name.removesuffix(".weight") in packed and name.endswith(".weight")), name
        assert tensor.dtype == before[name].dtype


def test_a_later_stage_trains_all_weights_again(make, tmp_path):
    later = {**TRAIN, "lora": None, "steps": 3}
    pipeline.run(make(PRUNE, TRAIN, {key: value for key, value in later.items() if value is not None}))
    pipeline.run(make(PRUNE, TRAIN, out="once"))
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict() for out in ("out", "once")]
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(states[0][embedding], states[1][embedding])


def test_an_interrupted_stage_goes_on_with_its_adapter(make, tmp_path):
    stages = [PRUNE, {**TRAIN, "save_steps": 3}]
    pipeline.run(make(*stages, out="expected"))
    recipe = make(*stages)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, progress=Stop(7))
    saved = tmp_path / "out.work" / "1-trainer" / "checkpoint-6"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    pipeline.run(recipe, resume=True)
    assert digests(tmp_path / "out", "model.safetensors") == digests(
        tmp_path / "expected", "model.safetensors"
    )


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([TRAIN], "lora trains packed blocks, and this model has none: prune it in a stage before"),
        ([PRUNE, {**TRAIN, "heal": "masked"}], "heal: lora trains packed blocks; leave `heal` out"),
        (
            [{**TRAIN, "pruner": {"method": "magnitude"}}],
            "lora: lora trains packed blocks, which a stage with a pruner does not have yet",
        ),
        ([PRUNE, TRAIN, {"stage": "convert", "format": "dense"}], "a later stage converts to dense weights"),
        (
            [PRUNE, {**TRAIN, "lora": {"targets": "qproj"}}],
            "lora target 'qproj' means no block-sparse layer; their names end in down_proj, gate_proj",
        ),
        ([PRUNE, {**TRAIN, "lora": {"rang": 4}}], "unknown key; did you mean .rank"),
    ],
    ids=["not pruned", "masked", "search", "dense", "target", "key"],
)
def test_what_cannot_be_is_told(make, stages, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.run(make(*stages))


def test_sound_meets_weights_of_lower_precision(tmp_path):
    spec = {"path": str(checkpoints.sounds(tmp_path))}
    recipe = {
        "version": 1,
        "model": str(checkpoints.wav2vec2(tmp_path / "dense")),
        "out": str(tmp_path / "out"),
        "dtype": "bfloat16",
        "data": {"train": spec},
        "stages": [PRUNE, {**TRAIN, "distill": {}, "steps": 2}, {"stage": "report"}],
    }
    report = pipeline.run(Recipe.from_dict(recipe)).report
    assert report is not None and report["history"][0]["points"]
