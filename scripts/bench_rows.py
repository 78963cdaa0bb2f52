"""A benchmark's rows in a JSON file: what is there already, what is missing, and the head of the page made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from reference_lm import sha256
from sparsify import measure

Case = TypeVar("Case")


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
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(report, indent=1) + "\n")
        fresh.replace(file)


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
