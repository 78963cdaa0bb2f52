"""The page `docs/benchmarks/recovery.md`, from the rows that `scripts/bench_recovery.py` measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from bench_rows import page_head
from sparsify.plots_speed import Point, tradeoff
from sparsify.sweep.front import front, trade

DEFAULT = "default"
PICTURE = "recovery-{task}.png"
# Title, key of the quality, factor to show it with, and whether lower is better.
TASKS: dict[str, tuple[str, str, float, bool]] = {
    "encoder": ("Sentence encoder, Spearman x 100 on STS-Benchmark dev", "spearman", 1.0, False),
    "sst2": ("The encoder as a classifier, accuracy in % on SST-2 dev", "accuracy", 100.0, False),
    "lm": ("Reference language model, perplexity on books-valid", "perplexity", 1.0, True),
}
COMMAND = """python scripts/bench_recovery.py --stsb path/to/sts-dev.csv --sst2 path/to/sst2 \\
    --wikitext path/to/valid.txt --books path/to/classic-books --lm build/reference \\
    --workers {workers} --out docs/benchmarks"""
# Where the speed of a block shape was measured, and on which product there.
SPEED_FILE = Path(__file__).parents[1] / "docs/benchmarks/kernels-h200.json"
SPEED_ROW = {"part": "prefill", "shape": [14336, 4096], "tokens": 4096}


def as_markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    introduction = (
        "Made by `scripts/bench_recovery.py`; do not edit. A default run prunes once (`block_obs` with reconstruction) "
        "and then trains what is left with the dense model as its teacher. Mean over the seeds, in brackets lowest and "
        "highest; `pruned` is before the training. Seconds are of a whole run, "
        f"{report['workers']} of them side by side on each GPU; the other columns do not depend on that."
    )
    lines = page_head(report, "What training gives back", introduction, COMMAND)
    for task, (title, *_) in TASKS.items():
        rows = [row for row in report["rows"] if row["task"] == task]
        if not rows:
            continue
        dense = mean(row["quality"]["dense"][TASKS[task][1]] for row in rows if "dense" in row["quality"])
        dense *= TASKS[task][2]
        lines += ["", f"## {title}", "", f"Dense: {dense:.2f}.", ""]
        changed = [row for row in rows if row["change"] != DEFAULT]
        default = [row for row in rows if row["change"] == DEFAULT]
        several = {(row["block"], row["sparsity"]) for row in default if row["seed"] > 0}
        lines += _table([row for row in default if (row["block"], row["sparsity"]) in several], task, dense)
        if changed:
            lines += [
                "",
                "### One thing changed",
                "",
                *_table(_beside_default(changed, default), task, dense),
            ]
        shapes = _shapes(default, several)
        if shapes:
            lines += ["", "### Block shapes: quality against speed", "", *_shape_table(shapes, task, dense)]
            lines += ["", f"![Quality against speed]({PICTURE.format(task=task)})"]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], folder: Path) -> None:
    """Draws quality against speed for each task whose block shapes were measured; see `as_markdown`."""
    for task, (title, key, factor, lower) in TASKS.items():
        rows = [row for row in report["rows"] if row["task"] == task and row["change"] == DEFAULT]
        several = {(row["block"], row["sparsity"]) for row in rows if row["seed"] > 0}
        points = []
        for row in _shapes(rows, several):
            speed = speedups(row["sparsity"]).get(row["block"])
            if speed is not None:
                value = row["quality"]["recovered"][key] * factor
                points.append(Point(row["block"], row["sparsity"], speed, value))
        if points:
            dense = mean(row["quality"]["dense"][key] for row in rows) * factor
            metric = "perplexity" if lower else key
            order = front([trade(point.speedup, metric, point.quality, dense) for point in points])
            panels = {f"{task}: after training": (points, [points[index] for index in order], None)}
            tradeoff(
                panels,
                folder / PICTURE.format(task=task),
                quality=title.partition(", ")[2],
                dense=dense,
                log=lower,
            )


def speedups(sparsity: float) -> dict[str, float]:
    """Measured speed-up of one large product over cuBLAS by block shape, from the benchmark of the kernels."""
    rows = json.loads(SPEED_FILE.read_text())["rows"]
    chosen = [row for row in rows if row["sparsity"] == sparsity]
    chosen = [row for row in chosen if all(row.get(key) == value for key, value in SPEED_ROW.items())]
    return {row["block"]: row["speedup"] for row in chosen}


def _beside_default(changed: list[dict[str, Any]], default: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The changed rows, each group after the default run of the same seeds."""
    places = {(row["block"], row["sparsity"], row["seed"]) for row in changed}
    return [row for row in default if (row["block"], row["sparsity"], row["seed"]) in places] + changed


def _shapes(default: list[dict[str, Any]], several: set[tuple[str, float]]) -> list[dict[str, Any]]:
    """First seed's rows of the sparsity at which further block shapes were tried."""
    tried = {row["sparsity"] for row in default if (row["block"], row["sparsity"]) not in several}
    return [row for row in default if row["seed"] == 0 and row["sparsity"] in tried]


def _table(rows: list[dict[str, Any]], task: str, dense: float) -> list[str]:
    _, key, factor, _ = TASKS[task]
    lines = [
        "| run | block | removed | pruned | recovered | against dense | parameters | seeds | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = sorted(rows, key=lambda row: row["sparsity"])
    for case in dict.fromkeys((row["block"], row["sparsity"], row["change"]) for row in order):
        own = [row for row in rows if (row["block"], row["sparsity"], row["change"]) == case]
        cells = [_range(own, label, key, factor) for label in ("pruned", "recovered")]
        block, sparsity, change = case
        lines.append(
            f"| {change} | {block} | {sparsity:.0%} | {' | '.join(cells)} | {_change(own, task, dense)} | "
            f"{own[0]['parameters'] / 1e6:.1f}M | {len(own)} | {max(row['seconds'] for row in own):.0f} |"
        )
    return lines


def _shape_table(rows: list[dict[str, Any]], task: str, dense: float) -> list[str]:
    _, key, factor, _ = TASKS[task]
    lines = [
        "Speed-up of a 14336 x 4096 layer at 4096 tokens over cuBLAS, from [kernels](kernels-h200.md).",
        "",
        "| block | removed | recovered | against dense | speed-up |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(
        rows, key=lambda row: (row["sparsity"], speedups(row["sparsity"]).get(row["block"], 0.0))
    ):
        speed = speedups(row["sparsity"]).get(row["block"])
        lines.append(
            f"| {row['block']} | {row['sparsity']:.0%} | {_range([row], 'recovered', key, factor)} | "
            f"{_change([row], task, dense)} | {'' if speed is None else f'{speed:.2f}'} |"
        )
    return lines


def _change(rows: list[dict[str, Any]], task: str, dense: float) -> str:
    _, key, factor, lower = TASKS[task]
    after = mean(row["quality"]["recovered"][key] for row in rows) * factor
    return f"{after / dense - 1:+.1%}" if lower else f"{after - dense:+.2f}"


def _range(rows: list[dict[str, Any]], label: str, key: str, factor: float) -> str:
    values = [row["quality"][label][key] * factor for row in rows if label in row["quality"]]
    if not values:
        return ""
    spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"
