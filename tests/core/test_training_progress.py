"""What one sees of a training while it runs."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsify import pipeline
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
