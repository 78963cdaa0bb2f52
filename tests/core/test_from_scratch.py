"""`from_scratch: true`: a checkpoint's configuration and tokenizer, and weights that the seed decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sparsify import pipeline
from sparsify.checkpoint import reader, scratch
from sparsify.errors import CheckpointError, ConfigError
from sparsify.layers.swap import masks_of
from sparsify.plan import make_plan
from sparsify.recipe.schema import Recipe
from sparsify.runtime.progress import Progress
from tests.cli import checkpoints
from tests.cli.checkpoints import digests

SEARCH = {"method": "group_lasso", "block": "32x32", "sparsity": 0.5, "until": 0.6}
TRAIN = {"stage": "finetune", "steps": 6, "batch": 4, "learning_rate": 2e-3, "pruner": SEARCH}
STAGES = [{"stage": "evaluate"}, TRAIN, {"stage": "convert"}, {"stage": "report"}]


@pytest.fixture
def make(tmp_path: Path):
    """Makes a recipe that trains a drawn Llama; the folder has configuration and tokenizer, and no weights."""
    checkpoints.llama(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    text = {"path": str(checkpoints.text(tmp_path)), "length": 32, "samples": 32}

    def make(out: str, *stages: dict[str, Any], **keys: Any) -> Recipe:
        values = {
            "version": 1,
            "model": str(tmp_path / "source"),
            "out": str(tmp_path / out),
            "from_scratch": True,
            "data": {"train": text},
            "stages": [*(stages or STAGES)],
        }
        return Recipe.from_dict({**values, **keys})

    return make


class _Break(Progress):
    """Presses Ctrl-C at a step of the training."""

    def __init__(self, step: int) -> None:
        self.left = step

    def task(self, label, total=None):
        return _Steps(self) if label.startswith("training") else super().task(label, total)


class _Steps:
    def __init__(self, owner: _Break) -> None:
        self.owner = owner

    def __enter__(self):
        return self.advance

    def __exit__(self, *error) -> None:
        pass

    def advance(self, count: float = 1, *, total: float | None = None, text: str = "") -> None:
        self.owner.left -= int(count)
        if self.owner.left <= 0:
            raise KeyboardInterrupt


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    folder = checkpoints.bert_classifier(tmp_path / "source")
    trained = reader.load(folder)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, same, other = (scratch.draw(folder, "cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(first) is type(trained) and not first.training
    query = "bert.encoder.layer.0.attention.self.query.weight"
    weights = [model.get_parameter(query) for model in (first, same, other, trained)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert weights[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert scratch.draw(folder, "cpu", "bfloat16", "masked-lm").dtype == torch.bfloat16


def test_a_drawn_model_is_pruned_trained_and_written(make, tmp_path) -> None:
    recipe = make("out")
    assert Recipe.from_dict(recipe.model_dump(mode="json", exclude_none=True)) == recipe
    plan = make_plan(recipe)  # a dry run
    note = f"from_scratch: weights are drawn anew with seed 0, not read from {tmp_path / 'source'}"
    assert note in plan.notes and plan.layers
    result = pipeline.run(recipe)
    assert result.report is not None and note in result.report["notes"]
    assert result.report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert masks_of(reader.load(tmp_path / "out"))
    kept = [AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("source", "out")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("step", [1, 4], ids=["before the first save", "in the search"])
def test_an_interrupted_run_goes_on_with_the_same_weights(make, tmp_path, step: int) -> None:
    stages = [STAGES[0], {**TRAIN, "save_steps": 2}, *STAGES[2:]]
    pipeline.run(make("whole", *stages))
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        pipeline.run(make("broken", *stages), progress=_Break(step))
    pipeline.run(make("broken", *stages), resume=True)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_random_weights_do_not_teach(make, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.distill: .*begins with random weights.*`teacher`"):
        make("out", {**TRAIN, "distill": {}})
    teacher = str(checkpoints.llama(tmp_path / "teacher"))
    pipeline.run(make("out", {**TRAIN, "distill": {"teacher": teacher}}))


def test_a_block_sparse_config_is_refused(make, tmp_path) -> None:
    pipeline.run(make("sparse"))
    with pytest.raises(CheckpointError, match="take the model in float32"):
        pipeline.run(make("out", model=str(tmp_path / "sparse")))
    with pytest.raises(CheckpointError, match="needs the config of a dense model"):
        scratch.draw(tmp_path / "sparse", "cpu")
