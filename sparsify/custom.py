"""Code of the user's own, named as `package.module:name`: how it is found, and how its mistakes are told."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError


def find(name: str, what: str, kind: type[SparsifyError]) -> Any:
    """What `package.module:name` names.

    Args:
        name: Where it is.
        what: What it should be, for messages, such as `"pruner"`.
        kind: Class of the errors.

    Raises:
        SparsifyError: Of the class `kind`, if the module cannot be imported or has nothing of this name.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code, which may hold any mistake
        plain = isinstance(error, (ImportError, ValueError))
        reason = str(error) if plain else f"{type(error).__name__}: {error}"
        last = "Class" if what in ("pruner", "module") else what
        raise kind(
            f"cannot import {what} {name!r}: {reason}; write package.module:{last} and see that the module is "
            f"installed or on PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise kind(f"cannot find {what} {name!r}: module {module_name!r} has no {attribute!r}")
    return found


def described(error: Exception) -> str:
    """An exception that called code raised, in one line: its class, its text, and the last line of that code's file.

    Args:
        error: As caught by the function that made the call.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if len(frames) > 1 and frame.filename == frames[1].filename]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
