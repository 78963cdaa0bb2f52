"""What `run` and `prune` share: a dry run, or the pipeline and its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.cli import console

if TYPE_CHECKING:
    from sparsify.pipeline import RunResult
    from sparsify.plan import Plan
    from sparsify.recipe import Recipe

SHOWN_LAYERS = 40


def run_recipe(recipe: Recipe, *, force: bool, resume: bool, dry_run: bool, as_json: bool) -> None:
    """Runs a recipe, or prints its plan, and prints what came of it."""
    console.quiet_transformers()
    if dry_run:
        from sparsify.plan import make_plan

        plan = make_plan(recipe, force=force)
        if as_json:
            console.print_json(plan.to_dict())
        else:
            _print_plan(plan)
        return
    from sparsify import pipeline

    result = pipeline.run(recipe, force=force, resume=resume, progress=console.RichProgress())
    if as_json:
        console.print_json({"out": result.out, "report": result.report})
    else:
        _print_result(result)


def _print_plan(plan: Plan) -> None:
    console.say(f"{plan.model}: {plan.architecture}, task {plan.task or 'none'}")
    for number, line in enumerate(plan.stages, 1):
        console.say(f"  {number}. {line}")
    if plan.layers:
        rows = [
            [
                layer.name,
                f"{layer.shape[0]}x{layer.shape[1]}",
                layer.block,
                str(layer.grid[0] * layer.grid[1]),
            ]
            for layer in plan.layers
        ]
        title = f"{len(rows)} weights to prune, {plan.sparsity:.0%} of their elements (scope {plan.scope})"
        console.print_table(["layer", "shape", "block", "blocks"], rows[:SHOWN_LAYERS], title)
        _more(len(rows))
    _print_kept_dense([[kept.name, _sides(kept.shape), kept.reason] for kept in plan.kept_dense])
    for note in plan.notes:
        console.say(f"note: {note}")
    console.say(
        f"dense weights {console.size(plan.bytes_dense)}; to be written about {console.size(plan.bytes_out)}"
    )
    if plan.bytes_work:
        console.say(f"the work folder needs up to {console.size(plan.bytes_work)} while the run goes on")
    console.say(f"would be written to {plan.out}" if plan.out else "nothing would be written")


def _print_result(result: RunResult) -> None:
    from sparsify.checkpoint.format import REPORT_PAGE
    from sparsify.stages.report import table

    if result.report is not None:
        totals = result.report["totals"]
        _print_kept_dense(
            [[kept["name"], _sides(kept["shape"]), kept["reason"]] for kept in result.report["kept_dense"]]
        )
        if result.report["columns"]:
            console.print_table(*table(result.report["columns"]))
        if totals["layers"]:
            console.say(
                f"{totals['layers']} weights pruned, {totals['sparsity']:.1%} of their elements removed"
            )
        if "bytes" in totals:
            console.say(f"weights on disk: {console.size(totals['bytes'])}")
        if result.out:
            console.say(f"report with pictures: {console.absolute(result.out / REPORT_PAGE)}")
    console.say(f"written to {console.absolute(result.out)}" if result.out else "nothing was written")


def _print_kept_dense(rows: list[list[str]]) -> None:
    if rows:
        console.print_table(["layer", "shape", "why"], rows[:SHOWN_LAYERS], f"stays dense: {len(rows)}")
        _more(len(rows))


def _more(count: int) -> None:
    if count > SHOWN_LAYERS:
        console.say(f"... and {count - SHOWN_LAYERS} more (--json lists all)")


def _sides(shape: tuple[int, ...] | list[int]) -> str:
    return "x".join(map(str, shape)) or "-"
