"""How a model was pruned in Python, told as a recipe beside its weights, as a run of the command line tells it."""

from __future__ import annotations

from typing import Any

import yaml
from torch import nn

from sparsify.layers.swap import sparse_modules
from sparsify.recipe.schema import PruneStage

_STAGES = "_sparsify_stages"
_HEAD = "# How sparsify.prune made this model. What was done to it before or since is not told here.\n"
_CALIBRATED = (
    "# It was calibrated with batches given in Python: to run this, name such data under data.calibration.\n"
)


def remember(model: nn.Module, stage: PruneStage, *, calibrated: bool) -> None:
    """Keeps in the model that a stage has pruned it, with calibration data or without."""
    stages: list[dict[str, Any]] = [{"stage": "calibrate"}] if calibrated else []
    stages.append(stage.model_dump(mode="json", exclude_none=True))
    model.__dict__[_STAGES] = [*model.__dict__.get(_STAGES, []), *stages]


def recorded(model: nn.Module) -> str | None:
    """The recipe, as YAML text, of what `remember` was told; `None` if that is nothing."""
    stages = model.__dict__.get(_STAGES)
    if stages is None:
        return None
    source = {"model": path} if (path := getattr(model, "name_or_path", "")) else {}
    packed = [{"stage": "convert", "dense_where_slower": "never"}] if sparse_modules(model) else []
    recipe = {"version": 1, "name": "prune", **source, "stages": [*stages, *packed]}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)
    calibrated = any(stage["stage"] == "calibrate" for stage in stages)
    return _HEAD + _CALIBRATED * calibrated + text
