"""`sparsify sweep`: which block shape and sparsity to take, from quality and speed measured here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.cli import console, options

if TYPE_CHECKING:
    from sparsify.sweep.file import Swept
    from sparsify.sweep.plan import SweepPlan


def sweep(
    model: options.Model,
    evaluation: Annotated[
        str,
        typer.Option(
            "--eval",
            help="Held-out data to choose by, no test split: a file, a folder, or a `datasets` name[:config].",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of sweep.json, sweep.png and scores.", show_default=False),
    ],
    data: Annotated[
        str | None, typer.Option("--data", help="Calibration data, for pruners that look at layer inputs.")
    ] = None,
    blocks: Annotated[
        str, typer.Option("--blocks", help="Block shapes, separated by commas.")
    ] = "16x16,32x32,64x64,128x128,128x16",
    sparsities: Annotated[
        str, typer.Option("--sparsities", help="Shares of the weights to remove, separated by commas.")
    ] = "0.5,0.75,0.9",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="A pruner or package.module:Class; default: block_obs with --data, else magnitude.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Option of the pruner; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    scope: Annotated[str, typer.Option("--scope", help="Budget, as in `sparsify prune`.")] = "global",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Layers: exact name, re:PATTERN or class name; may be repeated."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option("--ignore", help="Layers to leave dense.")] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="First reorder units so that strong weights share blocks.")
    ] = False,
    reconstruct: Annotated[
        int | None,
        typer.Option(
            "--reconstruct",
            help="Steps of training for each transformer block alone; default: 300 if no method is named.",
        ),
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in one sample of both data.")] = 512,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Samples of --data to use; default: as many as hold 65,536 tokens."),
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option("--eval-samples", help="Read at most so many samples of --eval.")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Split of a `datasets` name in --eval.")
    ] = "validation",
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Column of --eval to read; repeat for text and label, or pairs."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Samples of --eval in one forward pass.")] = 32,
    tokens: Annotated[
        str,
        typer.Option("--tokens", help="Tokens of each sequence whose speed is measured, such as 128,2048."),
    ] = "256",
    batches: Annotated[
        str, typer.Option("--batches", help="Sequences (or pictures, recordings) at once, such as 1,16.")
    ] = "1",
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds of each race, at most.")] = 20,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            help="Choose the fastest that loses at most so many points (of perplexity: per cent more); default: the "
            "knee of the front.",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Begin nothing new after this time; run again to go on.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    dense_where_slower: Annotated[
        str,
        typer.Option("--dense-where-slower", help="As in `sparsify prune`; never packs all layers."),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Measure anew what is known already.")] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    task: options.Task = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Prune in several block shapes and sparsities, measure quality and speed of each, and mark the best choice."""
    from sparsify.cli.tune import numbers
    from sparsify.data.spec import DataSpec
    from sparsify.sweep.plan import SweepPlan
    from sparsify.sweep.run import Sweep

    console.quiet_transformers()
    columns = tuple(column) if column else None
    spec = DataSpec.parse(evaluation, split=split, columns=columns, length=length, samples=eval_samples)
    plan = SweepPlan(
        model,
        [part.strip() for part in blocks.split(",") if part.strip()],
        numbers(sparsities),
        spec,
        out,
        data=data,
        pruning={
            "method": method,
            "scope": scope,
            "targets": target or None,
            "ignore": ignore or None,
            "permute": permute,
            "reconstruct": reconstruct,
        },
        options=option or (),
        length=length,
        samples=samples,
        dense_where_slower=dense_where_slower,
        tokens=tokens,
        batches=batches,
        repeats=repeats,
        batch=batch,
        max_loss=max_loss,
        minutes=minutes,
        force=force,
        dtype=dtype,
        device=device,
        task=task,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        _print_plan(plan, json)
        return
    found = Sweep(plan, console.RichProgress()).run()
    if json:
        console.print_json({**found.to_dict(), "file": str(plan.file)})
        return
    given: dict[str, Any] = {
        "data": data,
        "method": method,
        "option": option,
        "target": target,
        "ignore": ignore,
    }
    given |= {"reconstruct": reconstruct, "samples": samples, "permute": permute}
    given |= {
        "scope": scope if scope != "global" else None,
        "length": length if data and length != 512 else None,
    }
    _print(plan, found, ["sparsify", "prune", model, "--out", "DIR", *_as_options(given)])


def _as_options(given: dict[str, Any]) -> list[str]:
    """The options that were given, as they are written on a command line."""
    words: list[str] = []
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                words.append(f"--{name}")
            elif one is not None and one is not False:
                words += [f"--{name}", str(one)]
    return words


def _print_plan(plan: SweepPlan, as_json: bool) -> None:
    left = [{"block": block, "sparsity": sparsity} for block, sparsity in plan.missing(plan.found)]
    if as_json:
        facts = {"pairs": len(plan.pairs), "left": left, "workloads": plan.settings["workloads"]}
        console.print_json(facts | {"device": str(plan.device), "file": str(plan.file)})
        return
    pairs = "1 pair" if len(plan.pairs) == 1 else f"{len(plan.pairs)} pairs"
    console.say(f"{pairs}, {len(left)} to be measured on {plan.settings['device']}:")
    console.say("  " + ", ".join(f"{pair['block']} at {pair['sparsity']:.0%}" for pair in left))
    console.say(
        f"quality on {plan.settings['evaluated_on']}, speed in {'; '.join(plan.settings['workloads'])}"
    )
    console.say(f"would be written to {plan.file}")


def _print(plan: SweepPlan, found: Swept, command: list[str]) -> None:
    console.print_table(*found.table())
    for line in found.closing():
        console.say(line)
    for index in dict.fromkeys(found.best(work) for work in found.works):
        if index is not None:
            row = found.rows[index]
            words = [*command, "--block", row["block"], "--sparsity", f"{row['sparsity']:g}"]
            console.say(f"  {shlex.join(words)}")
    if found.left:
        console.say(f"{found.left} of {len(plan.pairs)} pairs are left: run it again to go on")
    console.say(f"written to {console.absolute(plan.file)}, sweep.png and sweep.md")
