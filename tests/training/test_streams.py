"""Training on data that are read while they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify import pipeline
from sparsify.errors import ConfigError, DataError
from sparsify.recipe.schema import Recipe
from tests.cli import checkpoints
from tests.cli.checkpoints import digests
from tests.training.stops import Stop

CASES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path]]] = {
    "causal-lm": (checkpoints.llama, checkpoints.text),
    "masked-lm": (checkpoints.bert_masked, checkpoints.text),
    "sequence-classification": (checkpoints.bert_classifier, checkpoints.labelled),
    "sentence-embedding": (checkpoints.bert, checkpoints.pairs),
}


@pytest.fixture
def make(tmp_path: Path):
    def make(task: str, out: str = "out", **keys: Any) -> Recipe:
        model, data = CASES[task]
        if not (tmp_path / "dense").exists():
            model(tmp_path / "dense")
        spec = {"path": str(data(tmp_path)), "length": 40, "samples": 20, "stream": True}
        train = {"stage": "finetune", "steps": 9, "batch": 4, "learning_rate": 2e-3, "save_steps": 3, **keys}
        return Recipe.from_dict(
            {
                "version": 1,
                "model": str(tmp_path / "dense"),
                "out": str(tmp_path / out),
                "task": task,
                "data": {"train": spec},
                "stages": [{"stage": "prune", "block": "32x32", "sparsity": 0.5}, train, {"stage": "report"}],
            }
        )

    return make


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "sentence-embedding"])
def test_a_stream_begins_again_where_it_ends_and_is_resumed(make, tmp_path, task):
    expected = pipeline.run(make(task, "expected")).report  # nine batches of a stream that has five
    assert expected is not None and set(expected["data"]) == {"train"}
    recipe = make(task)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, progress=Stop(8))
    found = pipeline.run(recipe, resume=True).report
    assert found is not None
    losses = [[point["loss"] for point in report["history"][0]["points"]] for report in (expected, found)]
    assert losses[0] == losses[1]
    name = "model.safetensors"
    assert digests(tmp_path / "out", name) == digests(tmp_path / "expected", name)


def test_a_teacher_works_on_a_stream_but_its_outputs_are_not_stored(make):
    report = pipeline.run(make("causal-lm", distill={})).report
    assert report is not None and len(report["history"][0]["points"]) > 1
    with pytest.raises(ConfigError, match="cache cannot be used, since the data are streamed"):
        pipeline.run(make("causal-lm", "other", distill={"teacher_memory": "cache"}))


def test_a_fault_in_a_stream_is_told_when_it_is_reached(make, tmp_path):
    recipe = make("sequence-classification")
    with (tmp_path / "labelled.csv").open("a") as stream:
        stream.write("\nlast,7")
    late = recipe.model_dump(mode="json", exclude_none=True)
    late["data"]["train"].pop("samples")
    with pytest.raises(DataError, match="row 33: label 7 is out of range; the model has 2 classes"):
        pipeline.run(Recipe.from_dict(late))


def test_pictures_are_not_streamed(make, tmp_path):
    CASES["image-classification"] = (checkpoints.vit, checkpoints.pictures)
    try:
        with pytest.raises(
            ConfigError, match="stream is for text; image-classification data are read and decoded"
        ):
            pipeline.run(make("image-classification"))
    finally:
        del CASES["image-classification"]
