"""What the verbs print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from sparsify.runtime.progress import Advance, Progress


def out() -> Console:
    """The console for results."""
    return Console(highlight=False)


def err() -> Console:
    """The console for progress, notes and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Prints one JSON document, the only thing on stdout."""
    print(json.dumps(document, indent=2, default=str))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Prints a table: text columns first, numbers to the right."""
    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        numeric = index > 0 and all(row[index][:1].isdigit() or row[index] == "-" for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = out()
    # Into a file or a pipe a table goes at its own width, whatever the terminal's.
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, _needed(header, rows)))
    console.print(table)


def say(text: str) -> None:
    """Prints a line of a result as it is."""
    out().print(text, markup=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes in words: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A time in words: `40 s`, `12 min`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# Seconds between two lines of one task where there is no terminal: in the log file of a long run.
QUIET = 30.0


class RichProgress(Progress):
    """Stages and notes as lines, tasks as bars (without a terminal as a line now and then), all on stderr."""

    def __init__(self) -> None:
        self._console = err()

    def stage(self, index: int, count: int, name: str) -> None:
        """Prints the stage's position and name."""
        self._console.print(f"[bold]stage {index + 1} of {count}: {name}[/bold]")

    def note(self, text: str) -> None:
        """Prints the note."""
        self._console.print(f"note: {escape(text)}")

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Shows a bar, or a spinner while the total is unknown, until the task ends."""
        if not self._console.is_terminal:
            yield self._lines(label, total)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Bars(*columns, console=self._console, transient=True) as bars:
            bar = bars.add_task(label, total=total, text="")

            def advance(count: float = 1, *, total: float | None = None, text: str = "") -> None:
                if total is not None:
                    bars.update(bar, total=total)
                if text:
                    bars.update(bar, text=escape(text))
                bars.advance(bar, count)

            yield advance

    def _lines(self, label: str, total: float | None) -> Advance:
        """Writes a line of how far the task is, once `QUIET` seconds have passed since the last one."""
        start = last = time.monotonic()
        done, whole, latest = 0.0, total, ""

        def advance(count: float = 1, *, total: float | None = None, text: str = "") -> None:
            nonlocal last, done, whole, latest
            done += count
            latest = text or latest
            whole = whole if total is None else total
            now = time.monotonic()
            if now - last < QUIET:
                return
            last = now
            parts = [
                f"{done:g}" if whole is None else f"{done:g} of {whole:g}",
                f"after {duration(now - start)}",
            ]
            if whole is not None and done:
                parts.append(f"about {duration((now - start) * (whole - done) / done)} left")
            self._console.print(escape(f"{label}: {', '.join(parts)}{'; ' * bool(latest)}{latest}"))

        return advance


def quiet_transformers() -> None:
    """Leaves progress and warnings to us: transformers would write its own bars between ours."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bar()
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
    if issubclass(category, UserWarning):
        err().print(f"warning: {escape(str(message))}")


def absolute(path: Path) -> str:
    """A path as the user can copy it."""
    return str(path.expanduser().resolve())


def _needed(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    return sum(widths) + 3 * len(widths) + 1
