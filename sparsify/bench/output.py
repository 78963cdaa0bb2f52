"""The files of a benchmark: its report as JSON, and a picture beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify import plots_speed
from sparsify.bench import verdict
from sparsify.errors import OutputError
from sparsify.runtime.workfolder import replace_text

PICTURE = ".png"


def check(file: Path, force: bool) -> Path:
    """The report's path, if it can be written.

    Raises:
        OutputError: If its name does not end in `.json`, or it exists and is not to be replaced.
    """
    file = file.expanduser()
    if file.suffix != ".json":
        raise OutputError(f"cannot write {file}: the report is JSON, give a name that ends in .json")
    if file.exists() and not force:
        raise OutputError(f"{file} exists: choose another name, or replace it with --force")
    return file


def write(report: Mapping[str, Any], file: Path) -> list[Path]:
    """Writes the report and, if anything was timed, the picture.

    Returns:
        The files written.

    Raises:
        OutputError: If that is impossible.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(report, indent=1, default=str) + "\n")
        layers, passes = _speedups(report)
        if not layers and not passes:
            return [file]
        picture = plots_speed.speedups(layers, passes, file.with_suffix(PICTURE), title=_title(report))
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error
    return [file, picture]


def _speedups(report: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    layers: dict[str, dict[str, float]] = {}
    for group in report["layers"]:
        name = (
            group["name"] if len(group["names"]) == 1 else f"{group['name']} ({len(group['names'])} like it)"
        )
        if group["times"]:
            layers[name] = {verdict.size_said(verdict.size(row)): row["speedup"] for row in group["times"]}
    passes: dict[str, dict[str, float]] = {}
    for row in report["end_to_end"]["times"] if report["end_to_end"] else []:
        passes.setdefault(verdict.work(row), {})[verdict.HOW[row["timing"]]] = row["speedup"]
    return layers, passes


def _title(report: Mapping[str, Any]) -> str:
    machine = report["gpu"] or report["environment"]["cpu"]
    return f"Speed-up over dense: {Path(report['path']).name}, {machine}, {report['dtype']}"
