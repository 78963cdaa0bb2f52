"""Whether `accelerate launch` or `torchrun` has started several processes, and which one this is; imports no torch."""

from __future__ import annotations

import os

from sparsify.errors import SparsifyError


class OtherProcessError(SparsifyError):
    """The first process has failed, and says why itself."""


def count() -> int:
    """How many processes share this run; 1 where none were launched."""
    # Batch systems set WORLD_SIZE by itself, for jobs of one process too.
    launched = {"RANK", "LOCAL_RANK"} <= os.environ.keys()
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1


def several() -> bool:
    """Whether this run is shared by several processes."""
    return count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not several() or os.environ["RANK"] == "0"


def is_sharding() -> bool:
    """Whether weights will be sharded in training (FSDP)."""
    return several() and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
