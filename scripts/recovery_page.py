"""The page `docs/benchmarks/recovery.md`, from the rows that `scripts/bench_recovery.py` measured."""

from __future__ import annotations

from statistics import mean
from typing import Any

from bench_rows import page_head

# Title, key of the quality, factor to show it with, and whether lower is better.
TASKS: dict[str, tuple[str, str, float, bool]] = {
    "encoder": ("Sentence encoder, Spearman x 100 on STS-Benchmark dev", "spearman", 1.0, False),
    "sst2": ("The encoder as a classifier, accuracy in % on SST-2 dev", "accuracy", 100.0, False),
    "lm": ("Reference language model, perplexity on books-valid", "perplexity", 1.0, True),
}
COMMAND = """python scripts/bench_recovery.py --stsb path/to/sts-dev.csv --sst2 path/to/sst2 \\
    --wikitext path/to/valid.txt --books path/to/classic-books --lm build/reference \\
    --workers {workers} --out docs/benchmarks"""


def as_markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    introduction = (
        "Made by `scripts/bench_recovery.py`; do not edit. Mean over the seeds, in brackets lowest and highest. "
        "`pruned` is after one-shot pruning with reconstruction, before any training of the whole model; searches have "
        f"no such point. Seconds are of a whole run, {report['workers']} of them side by side."
    )
    lines = page_head(report, "What training gives back", introduction, COMMAND)
    for task, (title, key, factor, lower) in TASKS.items():
        rows = [row for row in report["rows"] if row["task"] == task]
        if not rows:
            continue
        dense = mean(row["quality"]["dense"][key] for row in rows) * factor
        lines += ["", f"## {title}", "", f"Dense: {dense:.2f}.", ""]
        lines += ["| masks | block | removed | pruned | recovered | against dense | seeds | seconds |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        for case in dict.fromkeys((row["block"], row["sparsity"], row["masks"]) for row in rows):
            own = [row for row in rows if (row["block"], row["sparsity"], row["masks"]) == case]
            after = mean(row["quality"]["recovered"][key] for row in own) * factor
            change = f"{after / dense - 1:+.1%}" if lower else f"{after - dense:+.2f}"
            cells = [_range(own, label, key, factor) for label in ("pruned", "recovered")]
            block, sparsity, masks = case
            seconds = max(row["seconds"] for row in own)
            lines.append(
                f"| {masks} | {block} | {sparsity:.0%} | {' | '.join(cells)} | {change} | {len(own)} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _range(rows: list[dict[str, Any]], label: str, key: str, factor: float) -> str:
    values = [row["quality"][label][key] * factor for row in rows if label in row["quality"]]
    if not values:
        return ""
    spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"
