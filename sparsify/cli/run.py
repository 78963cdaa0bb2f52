"""`sparsify run`: a recipe from its first stage to its last."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.running import run_recipe


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or a name that `sparsify recipe list` shows.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Checkpoint to compress.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write.", show_default=False)
    ] = None,
    settings: options.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or another device.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="What the model is for.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run a recipe: an ordered list of stages (calibrate, prune, finetune, convert, evaluate, report)."""
    from sparsify.recipe.schema import Recipe

    values = {
        "model": model,
        "out": str(out) if out is not None else None,
        "device": device,
        "dtype": dtype,
        "task": task,
        "trust_remote_code": trust_remote_code or None,
    }
    ready = Recipe.load(recipe, settings or (), values)
    run_recipe(ready, force=force, resume=resume, dry_run=dry_run, as_json=json)
