"""The report of a run: what was done to which layer, and what was measured, for machines and for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sparsify
from sparsify import measure
from sparsify.blocks import BlockMask
from sparsify.data import spec as data
from sparsify.recipe.schema import Recipe, ReportStage
from sparsify.stages.state import State
from sparsify.targets import KeptDense

# Names of quality measures in the table; `loss`, `tokens` and `samples` stay in the file alone.
# Starts the key of a benchmark of lm-eval.
BENCHMARK = "benchmark "
QUALITIES = {"perplexity": "perplexity", "accuracy": "accuracy (%)", "spearman": "Spearman x 100"}


def run(stage: ReportStage, state: State) -> None:
    """Makes the report of all stages before this one; it is written beside the weights."""
    state.report = build(state)


def build(state: State) -> dict[str, Any]:
    """The report as it is written to `sparsify_report.json`.

    Returns:
        `sparsify` (version), `environment`, `recipe`, `data` (SHA-256 of each source), `layers` (shape, block, blocks,
        density, and bytes of the weight stored and dense), `kept_dense` (with reasons), `slower` (those of them that
        were pruned and would run slower block-sparse), `totals`, `permuted` (what reordering units gained, see
        `sparsify.permutation.gain`), `columns` (see `evaluate_models`), `history` (losses of each finetune stage) and
        `notes`.
    """
    element_size = state.model.dtype.itemsize
    dense = state.dense_masks
    layers = [layer_entry(name, mask, name not in dense, element_size) for name, mask in state.masks.items()]
    kept = [kept for kept in state.kept_dense if kept.name not in state.slower]
    kept += [KeptDense(name, state.masks[name].shape, reason) for name, reason in state.slower.items()]
    return {
        "sparsify": sparsify.__version__,
        "environment": measure.environment(),
        "recipe": state.recipe.model_dump(mode="json", exclude_none=True),
        "task": state.task,
        "data": fingerprints(state.recipe),
        "layers": layers,
        "kept_dense": [
            {"name": layer.name, "shape": list(layer.shape), "reason": layer.reason} for layer in kept
        ],
        "slower": state.slower,
        "totals": totals(state.masks),
        "permuted": state.permuted,
        "columns": state.columns,
        "history": state.history,
        "notes": state.notes,
    }


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the content and the settings of each source that a stage reads (see `data.spec.fingerprint`)."""
    readers = {"train": "finetune", "eval": "evaluate", "calibration": "calibrate"}
    stages = {stage.stage for stage in recipe.stages}
    sources = {kind: getattr(recipe.data, kind) for kind, stage in readers.items() if stage in stages}
    return {kind: data.fingerprint(spec) for kind, spec in sources.items() if spec is not None}


def layer_entry(name: str, mask: BlockMask, packed: bool, element_size: int) -> dict[str, Any]:
    """What the report says of one weight matrix."""
    dense = mask.shape[0] * mask.shape[1] * element_size
    indices = 4 * (mask.keep.shape[0] + 1 + mask.blocks_kept)
    stored = mask.blocks_kept * mask.block.numel * element_size + indices if packed else dense
    return {
        "name": name,
        "shape": list(mask.shape),
        "block": str(mask.block),
        "blocks": mask.blocks_kept,
        "grid": list(mask.keep.shape),
        "density": mask.density,
        "bytes": stored,
        "bytes_dense": dense,
    }


def totals(masks: Mapping[str, BlockMask]) -> dict[str, Any]:
    """Elements of all pruned weights and the share that was removed."""
    elements = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    kept = sum(mask.elements_kept for mask in masks.values())
    sparsity = 1 - kept / elements if elements else 0.0
    return {"layers": len(masks), "elements": elements, "elements_kept": kept, "sparsity": sparsity}


@dataclass(frozen=True)
class Measure:
    """One measure of all columns.

    Attributes:
        key: `perplexity`, `benchmark arc_easy acc`, `bytes`, `latency 256`, `latency 8 x 256`, ...
        title: Its name for people.
        values: One number a column, in the report's units; `None` where it was not measured.
        texts: The same, written with its unit.
    """

    key: str
    title: str
    values: list[float | None]
    texts: list[str | None]


def measures(columns: Mapping[str, Mapping[str, Any]]) -> list[Measure]:
    """What was measured, in the order of the table; measures that no column has are left out."""
    found: list[Measure] = []

    def add(key: str, title: str, values: list[Any], text: Callable[[Any], str]) -> None:
        if any(value is not None for value in values):
            texts = [None if value is None else text(value) for value in values]
            found.append(Measure(key, title, values, texts))

    all_columns = list(columns.values())
    for key, title in QUALITIES.items():
        add(key, title, [column.get("quality", {}).get(key) for column in all_columns], "{:.2f}".format)
    asked = dict.fromkeys(name for column in all_columns for name in column.get("benchmarks", {}))
    for name in asked:
        scores = [column.get("benchmarks", {}).get(name) for column in all_columns]
        texts = [None if score is None else _score(*score) for score in scores]
        values = [None if score is None else score[0] for score in scores]
        found.append(Measure(f"{BENCHMARK}{name}", name, values, texts))
    add("parameters", "parameters", [column.get("parameters") for column in all_columns], "{:,}".format)
    add("bytes", "bytes on disk", [column.get("bytes") for column in all_columns], "{:,}".format)
    peaks = [column.get("peak_memory") for column in all_columns]
    add("peak_memory", "peak memory of a forward", peaks, lambda value: f"{value / 1e6:.1f} MB")
    timed = [{1: column.get("latency", {})} for column in all_columns]
    for times, column in zip(timed, all_columns, strict=True):
        times |= {int(size): own for size, own in column.get("latency_batches", {}).items()}
    for size in sorted({size for times in timed for size in times}):
        for count in sorted({int(count) for times in timed for count in times.get(size, {})}):
            many = f"{size} x " if size > 1 else ""
            title = f"latency, {many}{count} token{'s' if count != 1 else ''}"
            values = [times.get(size, {}).get(str(count)) for times in timed]
            add(f"latency {many}{count}", title, values, lambda value: f"{value * 1e3:.2f} ms")
    return found


def _score(value: float, error: float | None) -> str:
    """A benchmark's score with its standard error."""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def table(columns: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Measurements as a table: its header and its rows, one row a measure."""
    rows = [[measure.title, *(text or "-" for text in measure.texts)] for measure in measures(columns)]
    return ["", *columns], rows


def as_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """`table` as plain text, the columns aligned."""
    header, rows = table(columns)
    cells = [header, *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]

    def line(row: list[str]) -> str:
        title, *values = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([title.strip().ljust(widths[0]), *values]).rstrip()

    return "\n".join(line(row) for row in cells)
