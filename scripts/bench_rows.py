"""A benchmark's rows in a JSON file: what is there already, what is missing, and the head of the page made of them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from reference_lm import sha256
from sparsify import measure

Case = TypeVar("Case")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options of those that measure the sentence encoder and the reference language model."""
    parser.add_argument("--stsb", type=Path, required=True, help="scored pairs to measure on (sts-dev.csv)")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2 valid text")
    parser.add_argument("--books", type=Path, required=True, help="folder of books-train* and books-valid*")
    parser.add_argument("--lm", type=Path, required=True, help="what scripts/reference_lm.py wrote")
    parser.add_argument("--encoder", type=Path, help="encoder (default: from its installed package)")
    parser.add_argument("--max-books", type=int, default=60, help="books read of each archive (default 60)")
    parser.add_argument("--workers", type=int, default=1, help="cases measured side by side (default 1)")


def open_report(file: Path, lm: Path, workers: int) -> dict[str, Any]:
    """What an earlier run left in `file`, or a report without rows; with this machine and language model."""
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    environment = measure.environment()
    del environment["command"]
    return report | {"environment": environment, "lm_sha256": sha256(lm), "workers": workers}


def missing(report: dict[str, Any], cases: Iterable[Case], only: str) -> list[Case]:
    """Cases without a row whose values, one after the other, match the regular expression `only`."""
    left = []
    for case in cases:
        values: dict[str, Any] = asdict(case)  # pyright: ignore[reportArgumentType]
        done = any(all(row[key] == value for key, value in values.items()) for row in report["rows"])
        if not done and re.search(only, " ".join(map(str, values.values()))):
            left.append(case)
    return left


def store(report: dict[str, Any], rows: Iterable[dict[str, Any]], file: Path) -> None:
    """Adds each row as it comes, prints it, and writes the whole file anew in one step."""
    for row in rows:
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        write(report, file)


def write(report: dict[str, Any], file: Path) -> None:
    """Writes the whole file anew in one step."""
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    fresh.replace(file)


def write_pages(out: Path, name: str, record: dict[str, Any], page: str) -> None:
    """Writes `NAME-MACHINE.json` and `.md`, each in one step: a run that is cut off keeps the rows that it has.

    Args:
        out: The folder.
        name: What was measured.
        record: All of it, with its `environment`.
        page: The same as Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    machine = (record["environment"].get("gpu") or ["cpu"])[0]
    stem = f"{name}-{machine.lower().replace('nvidia', '').strip().replace(' ', '-')}"
    for ending, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", page)):
        fresh = out / f"{stem}.tmp"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(out / f"{stem}{ending}")


def page_head(report: dict[str, Any], title: str, introduction: str, command: str) -> list[str]:
    """Lines of a page up to its tables: what it is, the command, the machine, the language model."""
    environment = report["environment"]
    versions = environment["versions"]
    machine = ", ".join([*(environment.get("gpu") or []), f"torch {versions['torch']}"])
    return [
        f"# {title}",
        "",
        introduction,
        "",
        "```bash",
        command.format(workers=report["workers"]),
        "```",
        "",
        f"{machine}, transformers {versions['transformers']}; SHA-256 of the language model's weights "
        f"`{report['lm_sha256']}`.",
    ]
