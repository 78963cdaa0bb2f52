"""`sparsify tune`: measure once which kernel is the fastest for each layer on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli import console, options


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint: block-sparse; or dense, with --block and --sparsity.", show_default=False
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            help="Instead of a checkpoint: weights as OUTxIN, separated by commas, or `standard`.",
        ),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option("--block", help="Block shapes of random masks, such as 64x64,128x16."),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", help="Sparsities of random masks, such as 0.5,0.75.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            help="Token counts, separated by commas; default: 1,16,256,4096 on a GPU, 1,16,256 on a CPU.",
        ),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Measure both gradients too, at 256 tokens and more.")
    ] = False,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats", help="Rounds of each measurement, at most; default: 7 on a GPU, 25 on a CPU."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Begin nothing new after this time; run again to go on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to add to, instead of this machine's own.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure anew what is known already.")] = False,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time every kernel of each distinct layer against dense, once; kernels are then chosen by the results."""
    from sparsify.tune import verdict
    from sparsify.tune.run import tune as measure

    console.quiet_transformers()
    report = measure(
        model,
        shapes=shapes,
        blocks=None if block is None else block.split(","),
        sparsities=None if sparsity is None else numbers(sparsity),
        tokens=tokens,
        training=training,
        repeats=repeats,
        minutes=minutes,
        device=device,
        dtype=dtype,
        out=out,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=console.RichProgress(),
    )
    if json:
        console.print_json(report)
    else:
        _print(report, verdict)


def _print(report: dict[str, Any], verdict: Any) -> None:
    console.say(f"measured on {report['device']}, kept in {report['file']}")
    if report["rows"]:
        console.print_table(*verdict.table(report["rows"]))
    for note in report["notes"]:
        console.say(f"note: {note}")
    for line in verdict.closing(report):
        console.say(line)


def numbers(text: str) -> list[float]:
    """Sparsities from text, separated by commas."""
    from sparsify.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"sparsity: got {text!r}, expected numbers such as 0.5,0.75") from error
