"""What a tuning found, as a table and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.bench.verdict import standing

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a product of a weight at one number of tokens."""
    header = ["layer", "layers", "weight", "block", "density", "product", "tokens", "dense us", "sparse us",
              "speed-up", "best kernel", ""]  # fmt: skip
    return header, [
        [
            row["name"],
            str(row["layers"]),
            "x".join(map(str, row["shape"])),
            row["block"],
            f"{row['density']:.3f}",
            row["op"],
            str(row["tokens"]),
            f"{row['dense_us']:.1f}",
            f"{row['sparse_us']:.1f}",
            f"{row['speedup']:.2f}x",
            row["kernel"],
            "slower than dense" if standing(row["speedup"]) == "slower" else "",
        ]
        for row in rows
    ]


def closing(report: Row) -> list[str]:
    """How much was measured, what was left out, and where sparse loses."""
    lines = []
    known = len(report["rows"]) - report["measured"]
    again = f", {known} were known already (--force measures them anew)" if known else ""
    lines.append(f"{_count(report['measured'], 'measurement')} made{again}")
    if report["left"]:
        lines.append(f"{_count(report['left'], 'measurement')} still to be made: run it again to go on")
    for drop in report["dropped"]:
        lines.append(f"left out: {drop['candidate']} ({drop['first']}): {drop['fault']}; please report it")
    for tokens in sorted({row["tokens"] for row in report["rows"]}):
        own = [row for row in report["rows"] if row["tokens"] == tokens and row["op"] == "dsd"]
        losing = sum(row["layers"] for row in own if standing(row["speedup"]) == "slower")
        total = sum(row["layers"] for row in own)
        if losing:
            what = f"{losing} of {_count(total, 'layer')}"
            lines.append(
                f"at {_count(tokens, 'token')} {what} {'is' if losing == 1 else 'are'} slower sparse than dense"
            )
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
