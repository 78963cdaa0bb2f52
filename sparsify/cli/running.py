"""What `run` and `prune` share: a dry run, or the pipeline and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from sparsify.cli import console
from sparsify.runtime.launch import is_first

if TYPE_CHECKING:
    from sparsify.estimate import Estimate
    from sparsify.pipeline import RunResult
    from sparsify.plan import Plan
    from sparsify.recipe.schema import Recipe

SHOWN_LAYERS = 40


def run_recipe(recipe: Recipe, *, force: bool, resume: bool, dry_run: bool, as_json: bool) -> None:
    """Runs a recipe, or prints its plan, and prints what came of it."""
    console.quiet_transformers()
    if dry_run:
        from sparsify.estimate import estimate
        from sparsify.plan import make_plan

        if not is_first():
            return
        plan = make_plan(recipe, force=force)
        costs = estimate(recipe, plan)
        if as_json:
            console.print_json(plan.to_dict() | {"estimates": [asdict(cost) for cost in costs]})
        else:
            _print_plan(plan, costs)
        return
    from sparsify import pipeline

    result = pipeline.run(recipe, force=force, resume=resume, progress=console.RichProgress())
    if not is_first():
        return
    if as_json:
        console.print_json({"out": result.out, "report": result.report})
    else:
        _print_result(result)


def _print_plan(plan: Plan, costs: Sequence[Estimate]) -> None:
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
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    largest = max(costs, key=lambda cost: cost.memory)
    disk = plan.bytes_out + plan.bytes_work
    more = "" if len(known) == len(costs) else " and what depends on the length of the data"
    needs = f"memory {console.size(largest.memory)} at the peak ({largest.stage}), disk {console.size(disk)}"
    console.say(f"estimated: {needs}, time {console.duration(sum(known))}{more}")
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
