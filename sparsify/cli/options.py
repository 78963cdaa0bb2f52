"""Options that several verbs share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Checkpoint: a local folder or a name on the Hub.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint in the output folder.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, say what would happen, write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or another device.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, float16 or bfloat16.")]
Task = Annotated[
    str,
    typer.Option(
        "--task",
        help="auto, causal-lm, masked-lm, sequence-classification, sentence-embedding, seq2seq, "
        "image-classification or speech-classification.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that the checkpoint brings with it.")
]
Module = Annotated[
    str | None,
    typer.Option(
        "--module",
        help="For the checkpoint of a plain module: its class, or a function that builds it, as package.module:name.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting, as key=value; may be repeated.", metavar="KEY=VALUE"),
]
