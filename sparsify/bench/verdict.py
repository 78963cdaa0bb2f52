"""What a benchmark's figures say, in words and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.bench.workloads import Workload

# Within this of dense, a layer is called neither faster nor slower.
TIE = 0.02
HOW = {"graph": "CUDA graph", "eager": "eager", "cpu": "CPU"}
BOTH = ("dense", "sparse")

Row = Mapping[str, Any]


def standing(speedup: float) -> str:
    """`faster`, `slower` or `equal`, for a speed-up over dense."""
    return "faster" if speedup > 1 + TIE else "slower" if speedup < 1 - TIE else "equal"


def closing(groups: Sequence[Row], end_to_end: Row | None) -> str:
    """Which layers win and which lose at which token counts, and how the whole model fares, in one sentence."""
    sizes = sorted({size(row) for row in _rows(groups)}, key=lambda own: (own[1] == "sample", own[0]))
    parts = [_layers_at(own, groups) for own in sizes]
    if end_to_end is not None and end_to_end["times"]:
        rows = end_to_end["times"]
        ways = len({row["timing"] for row in rows}) > 1
        said = [
            f"{row['speedup']:.2f}x in {work(row)}" + (f" ({HOW[row['timing']]})" if ways else "")
            for row in rows
        ]
        parts.append(f"the whole model has {_and(said)} the speed of the dense one")
    if not parts:
        return "Nothing could be timed."
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "."


def work(row: Row) -> str:
    """What a whole model was asked to do: `prefill of 8 x 256 tokens`."""
    return str(Workload(row["what"], row["batch"], row["tokens"], row["unit"]))


def size(row: Row) -> tuple[int, str]:
    """What was put into a layer: so many samples of the model's, or so many tokens."""
    return (row["tokens"], "token") if row["samples"] is None else (row["samples"], "sample")


def size_said(own: tuple[int, str]) -> str:
    """The same in words: `1 token`, `64 samples`."""
    return f"{own[0]} {own[1]}{'s' * (own[0] != 1)}"


def _layers_at(own: tuple[int, str], groups: Sequence[Row]) -> str:
    """For instance `at 256 tokens 12 of 14 layers are faster sparse than dense, 2 are slower`."""
    counts = {"faster": 0, "slower": 0, "equal": 0}
    for group in groups:
        for row in group["times"]:
            if size(row) == own:
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
    return f"at {size_said(own)} " + ", ".join([first.format(of), *(other.format("") for other in others)])


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
              "tokens", "dense us", "sparse us", "speed-up", "dense of limit", "sparse of limit", ""]  # fmt: skip
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
            tokens = str(row["tokens"])
            tokens += f" ({size_said(size(row))})" if row["samples"] is not None else ""
            rows.append([*first, tokens, *_figures(row), *_shares(row), _mark(row)])
        if group["skipped"]:
            rows.append([*first, *["-"] * 6, group["skipped"]])
    return header, rows


def model_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a workload and way of timing."""
    header = ["whole model", "timed", "dense us", "sparse us", "speed-up", "dense / s", "sparse / s",
              "dense of limit", "sparse of limit", "dense peak MB", "sparse peak MB", ""]  # fmt: skip
    return header, [
        [
            work(row),
            HOW[row["timing"]],
            *_figures(row),
            *(f"{row[f'{name}_rate']:,.1f} {row['unit']}s" for name in BOTH),
            *_shares(row),
            *(f"{row[f'{name}_peak_bytes'] / 1e6:.1f}" for name in BOTH),
            _mark(row),
        ]
        for row in rows
    ]


def energy_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a workload whose energy was measured."""
    header = ["energy above idle", "unit", "dense mJ", "sparse mJ", "saved",
              "dense W", "sparse W", "seconds", "updates"]  # fmt: skip
    found = []
    for row in rows:
        if row["energy"] is None:
            continue
        dense, sparse = (row["energy"][name] for name in BOTH)
        least = min(dense, sparse, key=lambda one: one["updates"])
        saved = 1 - sparse["joules_per_unit"] / dense["joules_per_unit"] if dense["joules_per_unit"] else None
        found.append(
            [
                work(row),
                row["unit"],
                *(f"{one['joules_per_unit'] * 1e3:.4g}" for one in (dense, sparse)),
                "-" if saved is None else f"{saved:.0%}",
                *(f"{one['watts']:.0f}" for one in (dense, sparse)),
                f"{least['seconds']:.1f}",
                str(least["updates"]),
            ]
        )
    return header, found


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
    return [f"{row['dense_us']:.1f}", f"{row['sparse_us']:.1f}", f"{row['speedup']:.2f}x"]


def _shares(row: Row) -> list[str]:
    return [f"{row[f'{name}_share']:.0%}" for name in BOTH]


def _mark(row: Row) -> str:
    """Marks what loses, and what a graph could not time."""
    slower = "slower than dense" if standing(row["speedup"]) == "slower" else ""
    return ", ".join(part for part in (slower, "eager" if row["timing"] == "eager" else "") if part)


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
