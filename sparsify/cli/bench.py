"""`sparsify bench`: where sparse is faster than dense, by how much, and at what cost of energy and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
            help="Tokens of each sequence, separated by commas; default: 1,16,256,2048 on a GPU, 1,16,128 on a CPU.",
        ),
    ] = None,
    batches: Annotated[
        str, typer.Option("--batches", help="Sequences (or pictures, recordings) at once, such as 1,16.")
    ] = "1",
    energy: Annotated[
        bool,
        typer.Option(
            "--energy", help="Measure joules a token or sample too; some ten seconds for each number."
        ),
    ] = False,
    module: options.Module = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            help="For such a module: a function from a number of samples to the forward pass's keyword arguments, as "
            "package.module:name; without it only layers are timed.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds of each measurement, at most.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSON file to write, with a picture (.png) beside it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of --out.")] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure layers and whole model, sparse against dense: time, throughput, memory, energy, the share of the limit.

    Refuses to report wrong outputs.
    """
    from sparsify.bench import output
    from sparsify.bench.checkpoint import bench as measure
    from sparsify.bench.checkpoint import plan

    console.quiet_transformers()
    wanted: dict[str, Any] = {
        "against": against,
        "tokens": tokens,
        "batches": batches,
        "repeats": repeats,
        "module": module,
        "inputs": inputs,
        "device": device,
        "dtype": dtype,
    }
    file = None if out is None else output.check(out, force)
    if dry_run:
        planned = plan(path, **wanted)
        facts = {"layers": len(planned.info.layers), "tokens": planned.tokens, "batches": planned.batches}
        facts |= {"device": str(planned.device), "file": None if file is None else str(file)}
        if json:
            console.print_json(facts)
        else:
            counts = {name: ", ".join(map(str, facts[name])) for name in ("tokens", "batches")}
            console.say(f"{facts['layers']} block-sparse weights on {facts['device']}, equal ones timed once")
            console.say(f"tokens {counts['tokens']}; sequences or samples at once {counts['batches']}")
            console.say(f"would be written to {file}" if file else "nothing would be written")
        return
    report = measure(
        path,
        energy=energy,
        trust_remote_code=trust_remote_code,
        progress=console.RichProgress(),
        **wanted,
    )
    written = [] if file is None else output.write(report, file)
    if json:
        console.print_json(report)
    else:
        _print(report, written)


def _print(report: dict[str, Any], written: list[Path]) -> None:
    from sparsify.bench import verdict

    console.say(verdict.place(report))
    limits = report["limits"]
    console.say(
        f"limits, measured here: {limits['flops'] / 1e12:.3g} TFLOP/s of a dense product, "
        f"{limits['bytes'] / 1e9:.3g} GB/s of a copy"
    )
    console.print_table(*verdict.layer_table(report["layers"]))
    whole = report["end_to_end"]
    if whole is not None:
        console.print_table(*verdict.model_table(whole["times"]))
        if report["energy"] is not None:
            console.print_table(*verdict.energy_table(whole["times"]))
            console.say(
                f"energy: {report['energy']['meter']}; idle, {report['energy']['idle_watts']:.1f} W, is subtracted"
            )
        console.say(
            f"weights in memory: {console.size(whole['bytes'])} sparse, {console.size(whole['bytes_dense'])} dense"
        )
        console.say(f"dense model: {whole['dense']}")
    for note in report["notes"]:
        console.say(f"note: {note}")
    console.say(report["verdict"])
    if report["advice"]:
        console.say(report["advice"])
    for file in written:
        console.say(f"written: {console.absolute(file)}")
