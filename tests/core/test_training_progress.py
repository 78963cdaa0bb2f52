"""What one sees of a training while it runs."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.integrations import integration_utils

from sparsify import pipeline
from sparsify.errors import ConfigError
from sparsify.plan import make_plan
from sparsify.recipe.schema import Recipe
from sparsify.runtime.progress import Progress
from tests.cli import checkpoints


class Texts(Progress):
    """Keeps the texts of tasks."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextmanager
    def task(self, label, total=None):
        def advance(count: float = 1, *, total: float | None = None, text: str = "") -> None:
            if text and label == "training":
                self.texts.append(text)

        yield advance


NUMBERS = r"loss \d+\.\d{3}, rate \d\.\de[+-]\d\d"


@pytest.mark.parametrize(
    ("pruner", "expected"),
    [
        (None, rf"{NUMBERS}, [\d,]+ tokens/s"),
        (
            {"method": "movement", "block": "32x32", "sparsity": 0.6, "until": 0.5},
            rf"{NUMBERS}, \d+% removed of 60%, .*",
        ),
    ],
    ids=["dense", "search"],
)
def test_a_training_tells_loss_rate_sparsity_and_speed(tmp_path: Path, pruner, expected):
    data = {"path": str(checkpoints.text(tmp_path)), "length": 32, "samples": 32}
    stage = {"stage": "finetune", "steps": 4, "batch": 4} | ({"pruner": pruner} if pruner else {})
    values = {"model": str(checkpoints.llama(tmp_path / "dense")), "out": str(tmp_path / "out")}
    texts = Texts()
    pipeline.run(
        Recipe.from_dict({"version": 1, **values, "data": {"train": data}, "stages": [stage]}), progress=texts
    )
    assert len(texts.texts) == 4 and all(re.fullmatch(expected, text) for text in texts.texts)
    speeds = [int(text.rpartition(", ")[2].partition(" ")[0].replace(",", "")) for text in texts.texts]
    assert all(speed > 10 for speed in speeds)
    if pruner:
        assert "60% removed of 60%" in texts.texts[-1]


def test_tensorboard_gets_what_the_training_tells_and_keeps_it(tmp_path: Path, monkeypatch):
    told: dict[str, set[str]] = {}

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.tags = told.setdefault(log_dir, set())

        def add_scalar(self, tag: str, *values: float) -> None:
            self.tags.add(tag)

        def add_text(self, *texts: str) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    data = {"path": str(checkpoints.text(tmp_path)), "length": 32, "samples": 32}
    search = {"method": "magnitude", "block": "32x32", "until": 0.9}
    stage = {
        "stage": "finetune",
        "steps": 3,
        "batch": 4,
        "pruner": search,
        "trainer": {"report_to": "tensorboard"},
    }
    values = {"model": str(checkpoints.llama(tmp_path / "dense")), "out": str(tmp_path / "out")}
    recipe = Recipe.from_dict({"version": 1, **values, "data": {"train": data}, "stages": [stage]})

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ConfigError, match="tensorboard is not installed, or transformers does not know it"):
        make_plan(recipe)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    pipeline.run(recipe)
    wanted = {"train/loss", "train/learning_rate", "train/sparsity", "train/tokens_per_second"}
    assert (
        list(told) == [str(tmp_path / "out.logs" / "0")] and wanted <= told[str(tmp_path / "out.logs" / "0")]
    )
