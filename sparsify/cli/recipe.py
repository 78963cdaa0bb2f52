"""`sparsify recipe`: the recipes that come with the package, and whether one is valid."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify.cli import console, options

app = typer.Typer(
    no_args_is_help=True,
    help="List, show and validate recipes.",
    epilog="Example: sparsify recipe show magnitude_oneshot > my_recipe.yaml",
)
Source = Annotated[str, typer.Argument(help="Recipe file, or a name that `sparsify recipe list` shows.")]


@app.command("list", epilog="Example: sparsify recipe list")
def list_recipes(json: options.Json = False) -> None:
    """List the packaged recipes."""
    from sparsify.recipe.file import locate, packaged

    found = {name: str(locate(name).data.get("description", "")) for name in packaged()}
    if json:
        console.print_json([{"name": name, "description": text} for name, text in found.items()])
    else:
        console.print_table(["recipe", "what for"], [[name, text] for name, text in found.items()])


@app.command("show", epilog="Example: sparsify recipe show magnitude_oneshot > my_recipe.yaml")
def show(recipe: Source) -> None:
    """Print a recipe's text, comments and all; also `accelerate/ddp` and `accelerate/fsdp2`, for several GPUs."""
    from sparsify.recipe.file import launch_configurations, locate

    launch = launch_configurations().get(recipe)
    print(locate(recipe).text if launch is None else launch.read_text(encoding="utf-8"), end="")


@app.command("validate", epilog="Example: sparsify recipe validate my_recipe.yaml --set prune.sparsity=0.6")
def validate(recipe: Source, settings: options.Set = None, json: options.Json = False) -> None:
    """Check a recipe and report every fault at once. Neither model nor data are touched."""
    from sparsify.recipe.schema import Recipe

    ready = Recipe.load(recipe, settings or ())
    if json:
        console.print_json(ready.model_dump(mode="json", exclude_none=True))
    else:
        console.say(f"{recipe} is valid: {', '.join(stage.stage for stage in ready.stages)}")
