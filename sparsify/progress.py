"""How long work says what it is doing: silent here, bars and lines where the command line overrides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]
"""`advance(count=1, text="")`: that many units are done; `text` says something short about them."""


class Progress:
    """Takes reports of progress and drops them."""

    def note(self, text: str) -> None:
        """Says one line that the user should know, such as a choice that `auto` made."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """A piece of work of `total` units (unknown if `None`); gives the function that advances it."""
        yield lambda count=1, text="": None
