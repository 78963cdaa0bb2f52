"""Stopping a run at a step of its training, as Ctrl-C does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsify.runtime.progress import Advance, Progress


class Stop(Progress):
    """Presses Ctrl-C at a step of the training.

    Args:
        step: That step, from 1.
    """

    def __init__(self, step: int) -> None:
        self._step = step

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        done = 0.0

        def advance(count: float = 1, *, total: float | None = None, text: str = "") -> None:
            nonlocal done
            done += count
            if label == "training" and done >= self._step:
                raise KeyboardInterrupt

        yield advance
