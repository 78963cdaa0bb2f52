"""`sparsify eval`: how good, how large and how fast a checkpoint is."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify.cli import console, options


def evaluate(
    path: options.Model,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Held-out data: a file, a folder, or a `datasets` name[:config].",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="A second checkpoint, such as the dense one, to set beside it."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a `datasets` name.")] = "test",
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Column to read; repeat for text and label, or pairs."),
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in one sample.")] = 512,
    samples: Annotated[int | None, typer.Option("--samples", help="Read at most this many samples.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Samples in one forward pass.")] = 8,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", help="Token count whose latency is measured; may be repeated. 0 for none."),
    ] = None,
    sequences: Annotated[
        list[int] | None,
        typer.Option(
            "--latency-batch", help="Sequences in a forward pass whose latency is measured; may be repeated."
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark", help="Task of lm-eval, or a task file of your own (.yaml); may be repeated."
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, help="Worked examples before each question of a benchmark."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions of each benchmark.  [default: all]")
    ] = None,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    task: options.Task = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure a checkpoint: perplexity or the task's own metric, parameters, bytes, peak memory, latency."""
    from sparsify.api import evaluate as measure
    from sparsify.data.spec import DataSpec
    from sparsify.stages.report import table

    console.quiet_transformers()
    spec = None
    if data is not None:
        columns = tuple(column) if column else None
        spec = DataSpec.parse(data, split=split, columns=columns, length=length, samples=samples)
    report = measure(
        path,
        spec,
        against=against,
        task=task,
        device=device,
        dtype=dtype,
        latency_tokens=[count for count in tokens or [1, 256] if count],
        latency_batches=sequences or [1],
        batch=batch,
        benchmarks=benchmark or [],
        shots=shots,
        limit=limit,
        trust_remote_code=trust_remote_code,
        progress=console.RichProgress(),
    )
    if json:
        console.print_json(report)
        return
    console.print_table(*table(report["columns"]))
    for note in report["notes"]:
        console.say(f"note: {note}")
