"""How long work says what it is doing: silent here, bars and lines where the command line overrides it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a task on."""

    def __call__(self, count: float = 1, *, total: float | None = None, text: str = "") -> None:
        """`count` more units are done, of `total` if that has become known; `text` says something short about them."""


class Progress:
    """Takes reports of progress and drops them."""

    def stage(self, index: int, count: int, name: str) -> None:
        """Stage `index` of `count` (from 0) of a recipe begins."""

    def note(self, text: str) -> None:
        """Says one line that the user should know, such as a choice that `auto` made."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """A piece of work of `total` units (unknown if `None`); gives the function that advances it."""
        yield _ignore


def _ignore(count: float = 1, *, total: float | None = None, text: str = "") -> None:
    pass
