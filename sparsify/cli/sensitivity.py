"""`sparsify sensitivity`: what the loss of each layer costs, for `--scope sensitivity` and for the eye."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsify.cli import console, options

if TYPE_CHECKING:
    from sparsify.sensitivity import Sensitivity
    from sparsify.sensitivity_file import Measured


def sensitivity(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Calibration data: a file, a folder, or a `datasets` name.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSON file; default: MODEL.sensitivity.json beside the model."),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="The pruner that scores the blocks.")] = "magnitude",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Option of the pruner; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    block: Annotated[str, typer.Option("--block", help="Block shape, OUTxIN.")] = "64x64",
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="Sparsities to measure, separated by commas.")
    ] = "0.25,0.5,0.75,0.9",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Layers: exact name, re:PATTERN or class name; may be repeated."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option("--ignore", help="Layers to leave out.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Samples, spread over the data.")] = 64,
    batch: Annotated[int, typer.Option("--batch", help="Samples in one forward pass.")] = 8,
    length: Annotated[int, typer.Option("--length", help="Tokens in one sample.")] = 512,
    split: Annotated[str, typer.Option("--split", help="Split of a `datasets` name.")] = "train",
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Column to read; repeat for text and label, or pairs."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure anew what is known already.")] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    task: options.Task = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Prune one layer at a time at a few sparsities and measure by how much the loss rises."""
    from sparsify.cli.tune import numbers
    from sparsify.data.spec import DataSpec
    from sparsify.sensitivity import Sensitivity, make_recipe

    console.quiet_transformers()
    spec = DataSpec.parse(data, split=split, columns=tuple(column) if column else None, length=length)
    pruning = {"method": method, "block": block, "targets": target or None, "ignore": ignore or None}
    recipe = make_recipe(
        model,
        spec,
        pruning,
        option or (),
        samples=samples,
        batch=batch,
        device=device,
        dtype=dtype,
        task=task,
        trust_remote_code=trust_remote_code,
    )
    work = Sensitivity(recipe, numbers(sparsity), out, force=force, progress=console.RichProgress())
    if dry_run:
        plan = {"layers": [layer.name for layer in work.layers], "sparsities": work.sparsities}
        plan |= {"passes": 1 + len(work.layers) * len(work.sparsities), "file": str(work.file)}
        if json:
            console.print_json(plan)
        else:
            console.say(f"{len(work.layers)} layers, {plan['passes']} passes over {samples} samples at most")
            console.say(f"would be written to {work.file}")
        return
    measured = work.run()
    if json:
        console.print_json({**measured.to_dict(), "file": str(work.file)})
    else:
        _print(work, measured, model, block)


def _print(work: Sensitivity, measured: Measured, model: str, block: str) -> None:
    header = ["layer", "shape", *(f"{sparsity:.0%}" for sparsity in work.sparsities)]
    rows = [
        [layer["name"], "x".join(map(str, layer["shape"])), *(f"{value:.4f}" for value in layer["increase"])]
        for layer in measured.layers
    ]
    console.print_table(header, rows, f"rise of the loss ({measured.unit}) when this layer alone is pruned")
    console.say(f"loss of the dense model: {measured.loss:.4f}")
    console.say(f"written to {console.absolute(work.file)} and {work.file.with_suffix('.png').name}")
    console.say(
        f"use it: sparsify prune {model} --out DIR --block {block} --scope sensitivity --sensitivity {work.file}"
    )
