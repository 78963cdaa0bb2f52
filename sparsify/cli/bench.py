"""`sparsify bench`: which layers are faster sparse than dense, and at how many tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify.cli import console, options


def bench(
    path: options.Model,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="The dense checkpoint to time end to end; default: the sparse one made dense."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            help="Token counts, separated by commas; default: 1,16,256,2048 on a GPU, 1,16,128 on a CPU.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds of each measurement, at most.")] = 20,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time each distinct layer and the whole model, sparse against dense; refuses to report wrong outputs."""
    from sparsify.bench import verdict
    from sparsify.bench.checkpoint import bench as measure

    console.quiet_transformers()
    report = measure(
        path,
        against=against,
        tokens=tokens,
        repeats=repeats,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=console.RichProgress(),
    )
    if json:
        console.print_json(report)
        return
    console.say(verdict.place(report))
    console.print_table(*verdict.layer_table(report["layers"]))
    whole = report["end_to_end"]
    if whole is not None:
        console.print_table(*verdict.model_table(whole["times"]))
        console.say(
            f"weights in memory: {console.size(whole['bytes'])} sparse, {console.size(whole['bytes_dense'])} dense"
        )
        console.say(f"dense model: {whole['dense']}")
    for note in report["notes"]:
        console.say(f"note: {note}")
    console.say(report["verdict"])
    if report["advice"]:
        console.say(report["advice"])
