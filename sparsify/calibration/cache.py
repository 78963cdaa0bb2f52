"""Tensors that a long walk leaves on the disk, so that an interruption or another sparsity loses nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparsify.errors import OutputError


class WalkCache:
    """A folder of safetensors files; each is complete or absent.

    Args:
        folder: Made with the first file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def read(self, name: str) -> dict[str, Tensor] | None:
        """What `write` stored as `name`, on the CPU; `None` if there is nothing, or nothing that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._file(name))
        except (OSError, SafetensorError):
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores contiguous CPU tensors in one step.

        Raises:
            OutputError: If the folder cannot be written to.
        """
        from safetensors.torch import save_file

        file = self._file(name)
        fresh = file.with_name(f"{file.name}.tmp-{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), fresh)
            fresh.replace(file)
        except OSError as error:
            raise OutputError(
                f"cannot write to the cache {self.folder}: {error.strerror or error}"
            ) from error

    def remove(self, folder: str) -> None:
        """Removes everything stored under `<folder>/`."""
        shutil.rmtree(self.folder / folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
