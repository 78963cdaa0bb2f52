"""`sparsify prune`: one pruning without a recipe file."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.running import run_recipe
from sparsify.errors import ConfigError


def prune(
    model: options.Model,
    out: options.Out,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="A pruner (see `sparsify pruners`) or package.module:Class; default: block_obs with --data, else "
            "magnitude.",
        ),
    ] = None,
    block: Annotated[
        str, typer.Option("--block", help="Block shape, OUTxIN; powers of two from 8 to 256.")
    ] = "64x64",
    sparsity: Annotated[
        float, typer.Option("--sparsity", help="Share of the weights to remove, 0 to 1.")
    ] = 0.5,
    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            help="Budget: global, layer, row (balanced block rows), erdos_renyi, outlier (with --data), sensitivity, "
            "or package.module:function.",
        ),
    ] = "global",
    sensitivity: Annotated[
        str | None,
        typer.Option("--sensitivity", help="For that scope: the file that `sparsify sensitivity` wrote."),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            "--floor", help="Smallest density a layer may get; default: a share of the mean density."
        ),
    ] = None,
    ceiling: Annotated[float, typer.Option("--ceiling", help="Largest density a layer may get.")] = 1.0,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="Layers to prune: exact name, re:PATTERN or class name; may be repeated."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Layers to leave dense, named in the same ways.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Option of the pruner; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="First reorder units so that strong weights share blocks.")
    ] = False,
    per_position: Annotated[
        bool, typer.Option("--per-position", help="A mask for each kernel position of a convolution.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="Calibration data, for pruners that look at layer inputs.")
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in one sample of --data.")] = 512,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Samples of --data to use; default: as many as hold 65,536 tokens."),
    ] = None,
    reconstruct: Annotated[
        int | None,
        typer.Option(
            "--reconstruct",
            help="Steps that each transformer block is then trained for, alone, to do what it did (with --data); "
            "default: 300 if no method is named.",
        ),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload", help="Keep the model in main memory, one transformer block at a time on the GPU."
        ),
    ] = False,
    dense_where_slower: Annotated[
        str,
        typer.Option(
            "--dense-where-slower",
            help="auto leaves layers dense that would run slower block-sparse here; never packs all.",
        ),
    ] = "auto",
    force: options.Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    task: options.Task = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Prune a checkpoint once and write it block-sparse, without training."""
    from sparsify.pruner import default_method
    from sparsify.recipe.schema import Recipe

    chosen, reconstruct = default_method(data is not None, method, reconstruct)
    pruning = {
        "method": chosen,
        "block": block,
        "sparsity": sparsity,
        "scope": scope,
        "sensitivity": sensitivity,
        "floor": floor,
        "ceiling": ceiling,
        "targets": target or None,
        "ignore": ignore or None,
        "permute": permute,
        "per_position": per_position,
        "reconstruct": reconstruct,
    }
    try:
        recipe = Recipe.oneshot(
            pruning,
            option or (),
            data,
            length,
            dense_where_slower,
            samples,
            offload=offload,
            model=model,
            out=str(out),
            device=device,
            dtype=dtype,
            task=task,
            trust_remote_code=trust_remote_code,
        )
    except ConfigError as error:  # it tells of stages, and the user wrote options
        raise ConfigError(re.sub(r"\bstages\.\d+(\.|: )", "", str(error))) from None
    run_recipe(recipe, force=force, resume=resume, dry_run=dry_run, as_json=json)
