"""Classifiers that begin as encoders: a head for the data's classes, dense training first, its result as teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparsify import pipeline
from sparsify.data.labels import number_labels
from sparsify.data.spec import DataSpec, classes
from sparsify.errors import ConfigError, DataError
from sparsify.plan import make_plan
from sparsify.recipe.schema import Recipe
from sparsify.runtime.progress import Progress
from sparsify.training import teacher
from tests.cli import checkpoints

TRAINING = {"stage": "finetune", "steps": 3, "batch": 4, "learning_rate": 2e-3, "save_steps": 2}
SEARCH = {"method": "magnitude", "block": "32x32", "sparsity": 0.5, "until": 0.9}
STAGES = [
    TRAINING,
    {"stage": "evaluate", "latency_tokens": []},
    {**TRAINING, "pruner": SEARCH, "distill": {}},
    {**TRAINING, "heal": "packed", "distill": {}},
    {"stage": "evaluate", "latency_tokens": []},
    {"stage": "report"},
]
SPEC = DataSpec(path="labels.csv")


def make_recipe(folder: Path, out: str, stages: list[dict[str, Any]] = STAGES, **keys: Any) -> Recipe:
    data = {use: {"path": str(folder / "moods.csv"), "length": 16} for use in ("train", "eval")}
    model, task = str(folder / "dense"), "sequence-classification"
    return Recipe.from_dict(
        {"version": 1, "model": model, "out": str(folder / out), "task": task, "data": data, "stages": stages, **keys}
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A bare encoder, and texts of three classes."""
    checkpoints.bert(tmp_path / "dense")
    moods = ("sad", "glad", "mad")
    rows = [f"{moods[index % 3][0] * 8} {index},{moods[index % 3]}" for index in range(24)]
    (tmp_path / "moods.csv").write_text("\n".join(["text,label", *rows]))
    return tmp_path


class Stop(Progress):
    """Interrupts the run after a number of training steps, counted over its stages."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Any]:
        def advance(count: float = 1, *, total: float | None = None, text: str = "") -> None:
            if label == "training" and total is None:
                self.left -= int(count)
                if self.left == 0:
                    raise KeyboardInterrupt

        yield advance


def test_the_head_has_the_classes_of_the_data_and_the_trained_dense_model_teaches(place: Path, monkeypatch):
    load, taught = teacher.load_teacher, []

    def loaded(settings: Any, source: str, *args: Any) -> Any:
        taught.append((Path(source).name, load(settings, source, *args)))
        return taught[-1][1]

    monkeypatch.setattr(teacher, "load_teacher", loaded)
    result = pipeline.run(make_recipe(place, "out"))
    config = transformers.AutoConfig.from_pretrained(place / "out")
    assert config.label2id == {"glad": 0, "mad": 1, "sad": 2} and config.id2label[2] == "sad"
    assert result.model.classifier.weight.shape[0] == 3
    assert list(result.report["columns"]) == ["dense", "recovered"]

    assert [name for name, _ in taught] == ["1-weights", "1-weights"]
    given = transformers.AutoModel.from_pretrained(place / "dense")
    assert not torch.equal(
        taught[0][1].bert.embeddings.word_embeddings.weight, given.embeddings.word_embeddings.weight
    )
    for parameter, other in zip(taught[0][1].parameters(), taught[1][1].parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert not (place / "out.work").exists()


@pytest.mark.parametrize("steps", [1, 5, 8], ids=["training the dense model", "searching", "healing"])
def test_an_interrupted_run_goes_on_with_the_same_head_and_teacher(place: Path, steps: int):
    pipeline.run(make_recipe(place, "whole"))
    torch.manual_seed(steps)  # the new head depends on the recipe's seed alone
    with pytest.raises(pipeline.Interrupted):
        pipeline.run(make_recipe(place, "out"), progress=Stop(steps))
    torch.manual_seed(0)
    pipeline.run(make_recipe(place, "out"), resume=True)
    assert checkpoints.digests(place / "out") == checkpoints.digests(place / "whole")


def test_a_head_of_other_classes_is_drawn_anew_only_if_asked(tmp_path: Path):
    checkpoints.bert_classifier(tmp_path / "dense")
    rows = [f"{'abc'[index % 3] * 8},{index % 3}" for index in range(12)]
    (tmp_path / "moods.csv").write_text("\n".join(["text,label", *rows]))
    with pytest.raises(DataError, match="label 2 is out of range; the model has 2 classes"):
        pipeline.run(make_recipe(tmp_path, "out", [TRAINING]))
    result = pipeline.run(make_recipe(tmp_path, "out", [TRAINING], classes="data"))
    assert result.model.classifier.weight.shape[0] == 3
    assert result.model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_a_stage_of_no_steps_is_left_out(tmp_path: Path):
    checkpoints.bert_classifier(tmp_path / "dense")
    checkpoints.labelled(tmp_path).rename(tmp_path / "moods.csv")
    stages = [{**TRAINING, "steps": 0}, *STAGES[2:4]]
    recipe = make_recipe(tmp_path, "out", stages)
    assert recipe.taught_by(1) is None and make_plan(recipe).stages[0] == "finetune: left out"
    pipeline.run(recipe)
    pipeline.run(make_recipe(tmp_path, "other", STAGES[2:4], seed=1))  # a stage's seed is its place
    assert checkpoints.digests(tmp_path / "out") == checkpoints.digests(tmp_path / "other")


def test_who_teaches(place: Path):
    dense, student = TRAINING, {**TRAINING, "distill": {}}
    search = {**TRAINING, "pruner": SEARCH}
    named = {**TRAINING, "distill": {"teacher": "elsewhere"}}
    recipe = make_recipe(
        place, "out", [student, dense, dense, student, student, named, search, dense, student]
    )
    assert [recipe.taught_by(index) for index in range(9)] == [None, None, None, 2, 2, None, None, None, 2]


def test_from_scratch_needs_a_trained_teacher(place: Path):
    student = {**TRAINING, "distill": {}}
    with pytest.raises(
        ConfigError, match=r"begins with random weights .* finetune stage before the first pruning"
    ):
        make_recipe(place, "out", [{**TRAINING, "steps": 0}, student], from_scratch=True)
    assert make_recipe(place, "out", [TRAINING, student], from_scratch=True).taught_by(1) == 0


def test_a_teacher_whose_head_nothing_has_trained_is_refused_before_the_run(place: Path):
    with pytest.raises(
        ConfigError, match=r"stage 0 learns from .* head .* would be new .* before the first pruning"
    ):
        make_plan(make_recipe(place, "out", STAGES[2:]))
    with pytest.raises(ConfigError, match="stage without steps cannot prune"):
        make_recipe(place, "out", [{**STAGES[2], "steps": 0}])
    with pytest.raises(ConfigError, match="no finetune stage trains it"):
        make_plan(make_recipe(place, "out", [{"stage": "evaluate"}], classes="data"))
    with pytest.raises(
        ConfigError, match=r"classes: data is for the tasks .* this recipe's task is masked-lm"
    ):
        checkpoints.bert_masked(place / "masked")
        keys = {"model": str(place / "masked"), "task": "masked-lm", "classes": "data"}
        make_plan(Recipe.from_dict({**make_recipe(place, "out", [TRAINING]).model_dump(mode="json"), **keys}))


LABELS = {
    "words": (["b", "a", "b"], {"a": 0, "b": 1}),
    "numbers": ([2, "0"], {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_numbered(name: str):
    labels, expected = LABELS[name]
    assert number_labels(labels, SPEC) == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "has 1 class: a classifier needs at least 2"),
        (["0.5", "1.5"], "label '0.5' cannot be"),
        ([0, -1], "label '-1' cannot be"),
        (["a", "1"], "label 'a' cannot be the name of a class beside numbers"),
        ([], "has 0 class"),
    ],
    ids=["one class", "scores", "unknown", "mixed", "none"],
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], message: str):
    with pytest.raises(DataError, match=message):
        number_labels(labels, SPEC)


def test_classes_of_pictures_recordings_and_streams(tmp_path: Path):
    assert classes(DataSpec(path=checkpoints.pictures(tmp_path)), "image-classification") == {
        "bright": 0,
        "dark": 1,
    }
    assert classes(DataSpec(path=checkpoints.sounds(tmp_path)), "speech-classification") == {
        "high": 0,
        "low": 1,
    }
    streamed = DataSpec(path=checkpoints.labelled(tmp_path), stream=True)
    with pytest.raises(DataError, match="is streamed, and the classes of a new head"):
        classes(streamed, "sequence-classification")
