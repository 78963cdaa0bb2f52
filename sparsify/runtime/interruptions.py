"""What ends a run early: Ctrl-C, SIGTERM, a device without memory left; and what to say then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsify.errors import DeviceMemoryError
from sparsify.recipe.schema import FinetuneStage

INTERRUPTED, TERMINATED = 130, 143


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a run; its text says what is left and how to go on.

    Attributes:
        exit_code: What a process that ends because of it exits with, as shells do: 128 and the signal's number.
    """

    exit_code = INTERRUPTED


class Terminated(Interrupted):
    """SIGTERM, as batch systems send it before they take a machine away."""

    exit_code = TERMINATED


@contextmanager
def stoppable() -> Iterator[None]:
    """Lets SIGTERM stop what is inside as Ctrl-C does; in threads other than the main one it stays as it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def memory_told(stage: Any, index: int, how_to_go_on: str) -> Iterator[None]:
    """Says in one line what to lower when a stage runs out of memory.

    Args:
        stage: The stage that runs.
        index: Its position in the recipe, from 0.
        how_to_go_on: What is kept, and how to go on.

    Raises:
        DeviceMemoryError: Instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if not full:
            raise
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "main memory"
        raise DeviceMemoryError(
            f"the {where} is too small for stage {index + 1} ({stage.stage}): {advice(stage, index)}; {how_to_go_on}"
        ) from error


def advice(stage: Any, index: int) -> str:
    """Which of a stage's settings to lower, with the numbers."""
    key = f"stages.{index}"
    if not isinstance(stage, FinetuneStage):
        batch = getattr(stage, "batch", 1)
        lower = f"lower its batch (--set {key}.batch={batch // 2}), " if batch > 1 else ""
        return f"{lower}take shorter samples (`length`), a smaller dtype, or offload: true"
    parts = []
    if stage.batch > 1:
        fewer = stage.batch // 2 if stage.batch % 2 == 0 else 1
        more = stage.accumulate * stage.batch // fewer
        parts.append(
            f"take fewer samples at once for the same steps (--set {key}.batch={fewer} --set {key}.accumulate={more})"
        )
    if not stage.gradient_checkpointing:
        parts.append(f"recompute activations (--set {key}.gradient_checkpointing=true)")
    return ", ".join([*parts, "take shorter samples (`length`), or heal packed blocks at a higher sparsity"])
