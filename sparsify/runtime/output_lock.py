"""Keeps two runs out of one output folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from sparsify.errors import OutputError


class OutputLock:
    """A lock of the operating system on `<out>.lock`, held from `with` to its end; it dies with its process.

    Args:
        out: The output folder; it need not exist.

    Raises:
        OutputError: On entering, if another run holds the lock, or the lock's file cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._path = out, out.with_name(out.name + ".lock")
        self._descriptor = -1
        self._made: list[Path] = []

    def __enter__(self) -> OutputLock:
        self._made = [folder for folder in self._path.parents if not folder.exists()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._taken():
                pass
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot lock {self._path}: {reason}; choose another output folder") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something has been written
                break

    def _taken(self) -> bool:
        """Whether the lock is ours now; `False` if the file vanished meanwhile, with the run that had it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.fstat(descriptor).st_ino == self._path.stat().st_ino
        except BlockingIOError:
            process = os.read(descriptor, 20).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise OutputError(
                f"another run (process {process}) is writing to {self._out}: wait until it has ended, or choose "
                f"another folder"
            ) from None
        except FileNotFoundError:
            same = False
        if not same:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return True
