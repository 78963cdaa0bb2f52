"""What a benchmark's figures say, in words and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Within this of dense, a layer is called neither faster nor slower.
TIE = 0.02
HOW = {"graph": "CUDA graph", "eager": "eager", "cpu": "CPU"}

Row = Mapping[str, Any]


def standing(speedup: float) -> str:
    """`faster`, `slower` or `equal`, for a speed-up over dense."""
    return "faster" if speedup > 1 + TIE else "slower" if speedup < 1 - TIE else "equal"


def closing(groups: Sequence[Row], end_to_end: Row | None) -> str:
    """Which layers win and which lose at which token counts, and how the whole model fares, in one sentence."""
    parts = [_layers_at(tokens, groups) for tokens in sorted({row["tokens"] for row in _rows(groups)})]
    if end_to_end is not None and end_to_end["times"]:
        rows = end_to_end["times"]
        ways = len({row["timing"] for row in rows}) > 1
        said = [
            f"{row['speedup']:.2f}x at {_tokens(row['tokens'])}"
            + (f" ({HOW[row['timing']]})" if ways else "")
            for row in rows
        ]
        parts.append(f"the whole model has {_and(said)} the speed of the dense one")
    if not parts:
        return "Nothing could be timed."
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "."


def _layers_at(tokens: int, groups: Sequence[Row]) -> str:
    """For instance `at 256 tokens 12 of 14 layers are faster sparse than dense, 2 are slower`."""
    counts = {"faster": 0, "slower": 0, "equal": 0}
    for group in groups:
        for row in group["times"]:
            if row["tokens"] == tokens:
                counts[standing(row["speedup"])] += len(group["names"])
    total = sum(counts.values())
    words = {
        "faster": "faster sparse than dense",
        "slower": "slower sparse than dense",
        "equal": "as fast as dense",
    }
    first, *others = [
        f"{counts[key]}{{}} {'is' if counts[key] == 1 else 'are'} {words[key]}"
        for key in words
        if counts[key]
    ]
    of = f" of {total} {'layer' if total == 1 else 'layers'}"
    return f"at {_tokens(tokens)} " + ", ".join([first.format(of), *(other.format("") for other in others)])


def _rows(groups: Sequence[Row]) -> list[Row]:
    return [row for group in groups for row in group["times"]]


def advice(groups: Sequence[Row]) -> str | None:
    """What to do about layers that lose at some token count; `None` if none does."""
    losing = sum(
        len(group["names"])
        for group in groups
        if any(standing(row["speedup"]) == "slower" for row in group["times"])
    )
    if not losing:
        return None
    return (
        f"{losing} {'layer loses' if losing == 1 else 'layers lose'} at some token count: remove more of them, use "
        f"larger blocks, or leave them dense (`sparsify prune --ignore`)"
    )


def layer_table(groups: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a group of layers and token count."""
    header = ["layer", "layers", "weight", "block", "density", "memory MB", "dense MB",
              "tokens", "dense us", "sparse us", "speed-up", ""]  # fmt: skip
    rows = []
    for group in groups:
        first = [
            group["name"],
            str(len(group["names"])),
            " + ".join("x".join(map(str, shape)) for shape in group["shapes"]),
            group["block"],
            f"{group['density']:.3f}",
            f"{group['bytes'] / 1e6:.3f}",
            f"{group['bytes_dense'] / 1e6:.3f}",
        ]
        for row in group["times"]:
            rows.append([*first, *_figures(row), _mark(row)])
        if group["skipped"]:
            rows.append([*first, "-", "-", "-", "-", group["skipped"]])
    return header, rows


def model_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a token count and way of timing."""
    header = ["whole model", "tokens", "dense us", "sparse us", "speed-up", ""]
    return header, [[HOW[row["timing"]], *_figures(row), _mark(row)] for row in rows]


def place(document: Row) -> str:
    """The machine and the software in one line."""
    environment = document["environment"]
    versions = environment["versions"]
    if document["gpu"]:
        software = f"CUDA {environment['cuda']}, torch {versions['torch']}, triton {versions['triton']}"
        return f"{document['gpu']}, {software}, {document['dtype']}"
    threads = environment["threads"]
    return (
        f"{environment['cpu']}, {threads} {'thread' if threads == 1 else 'threads'} of {environment['cpu_count']} "
        f"cores, torch {versions['torch']}, {document['dtype']}"
    )


def _figures(row: Row) -> list[str]:
    return [
        str(row["tokens"]),
        f"{row['dense_us']:.1f}",
        f"{row['sparse_us']:.1f}",
        f"{row['speedup']:.2f}x",
    ]


def _mark(row: Row) -> str:
    """Marks what loses, and what a graph could not time."""
    slower = "slower than dense" if standing(row["speedup"]) == "slower" else ""
    return ", ".join(part for part in (slower, "eager" if row["timing"] == "eager" else "") if part)


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
