"""Checkpoints of a training: whole or not at all, and one line where the disk is full."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsify.errors import OutputError

# What torch.save says where a file could not be written to the end.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")


@contextmanager
def written_whole(folder: Path) -> Iterator[None]:
    """Turns a failure to write the checkpoint `folder` into one line, and removes what was written of it.

    Raises:
        OutputError: If it could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITER):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        reason = (
            "the disk is full" if full else getattr(error, "strerror", None) or str(error).splitlines()[0]
        )
        raise OutputError(
            f"cannot write the checkpoint {folder}: {reason}; make room on its disk and go on with --resume: "
            f"checkpoints before it are whole"
        ) from error
