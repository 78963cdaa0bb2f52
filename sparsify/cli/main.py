"""The command `sparsify`: its verbs, and how errors end it.

Exit codes: 0 done; 2 something the user can put right, told in one line; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

import sparsify
from sparsify.cli import console
from sparsify.cli.bench import bench
from sparsify.cli.densify import densify
from sparsify.cli.eval import evaluate
from sparsify.cli.inspect import inspect
from sparsify.cli.prune import prune
from sparsify.cli.pruners import pruners
from sparsify.cli.recipe import app as recipe_app
from sparsify.cli.run import run
from sparsify.cli.sensitivity import sensitivity
from sparsify.cli.sweep import sweep
from sparsify.cli.tune import tune
from sparsify.errors import DeviceMemoryError, SparsifyError
from sparsify.runtime.launch import OtherProcessError, is_first, several

USER_ERROR, INTERRUPTED = 2, 130


class _Verbs(TyperGroup):
    """Turns our errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OtherProcessError as error:
            raise typer.Exit from error
        except SparsifyError as error:
            if not is_first() and not isinstance(error, DeviceMemoryError):
                raise typer.Exit(USER_ERROR) from error  # the first process says the same
            console.err().print(f"[bold red]error:[/bold red] {escape(str(error))}")
            raise typer.Exit(USER_ERROR) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not worth importing for this
                raise
            advice = "lower batch or length, or take a smaller dtype or another device"
            console.err().print(f"[bold red]error:[/bold red] the GPU is out of memory: {advice}")
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            if is_first():
                console.err().print(escape(str(error) or "interrupted"))
            raise typer.Exit(getattr(error, "exit_code", INTERRUPTED)) from error


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn a dense Hugging Face checkpoint into a smaller, faster block-sparse one.",
    epilog="Example: sparsify prune path/to/model --out path/to/sparse --block 64x64 --sparsity 0.5",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sparsify {sparsify.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _example(command: str) -> str:
    return f"Example: {command}"


app.command(
    "run",
    epilog=_example(
        "sparsify run magnitude_oneshot --model path/to/model --out path/to/sparse --set prune.sparsity=0.6"
    ),
)(run)
app.command(
    "prune",
    epilog=_example(
        "sparsify prune path/to/model --out path/to/sparse --block 64x64 --sparsity 0.5 --data texts.txt"
    ),
)(prune)
app.command("inspect", epilog=_example("sparsify inspect path/to/sparse --json"))(inspect)
app.command(
    "eval", epilog=_example("sparsify eval path/to/sparse --data held_out.txt --against path/to/model")
)(evaluate)
app.command(
    "bench",
    epilog=_example(
        "sparsify bench path/to/sparse --against path/to/model --tokens 128,2048 --batches 1,16 --out bench.json"
    ),
)(bench)
app.command("tune", epilog=_example("sparsify tune path/to/sparse --tokens 1,16,256,4096"))(tune)
app.command(
    "sensitivity",
    epilog=_example("sparsify sensitivity path/to/model --data train.txt --block 64x64 --samples 64"),
)(sensitivity)
app.command(
    "sweep",
    epilog=_example(
        "sparsify sweep path/to/model --blocks 32x32,64x64,128x16 --sparsities 0.5,0.75 --data train.txt "
        "--eval held_out.txt --out path/to/sweep"
    ),
)(sweep)
app.command("densify", epilog=_example("sparsify densify path/to/sparse --out path/to/dense"))(densify)
app.command("pruners", epilog=_example("sparsify pruners"))(pruners)
app.add_typer(recipe_app, name="recipe")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    if several():
        # DistributedDataParallel would warn each process that no parameter goes unused, which others' models may have.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A pruner's own file is often in the current folder, which an installed command does not search by itself.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    app(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="sparsify")
