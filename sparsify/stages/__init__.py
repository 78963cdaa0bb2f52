"""The stages of a recipe, one module each: `run(stage, state)` does the stage's work on the state of the run."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sparsify.stages.state import State


def run_stage(stage: Any, state: State) -> None:
    """Runs one stage of a recipe; its `stage` key names the module."""
    import_module(f"sparsify.stages.{stage.stage}").run(stage, state)
