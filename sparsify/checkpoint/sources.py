"""Where a checkpoint comes from, and whether it is complete and safe to load."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.checkpoint.files import read_headers, weight_files
from sparsify.errors import CheckpointError

# Key of a plain module's `config.json`: the module's class, for people and messages alone.
MODULE_CLASS = "module_class"
# What no program of ours ever reads from a repository on the Hub.
_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]


def check_source(
    path: str | Path, trust_remote_code: bool = False, weights: bool = True, plain: bool = False
) -> Path:
    """Checks that a checkpoint, dense or block-sparse, is complete and safe to load, before anything is loaded.

    Args:
        path: A folder, or a name on the Hub (which is downloaded).
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        weights: Whether its weights are wanted.
        plain: Whether it may be that of a plain module, which no config can build.

    Returns:
        The local folder.

    Raises:
        CheckpointError: If the folder, its `config.json` or a weight file is missing, a file is truncated, the
            weights are a pickle, or the model needs code from the checkpoint or of the caller.
    """
    folder = local_folder(path)
    config = read_config(folder)
    name = module_class(config)
    if name is not None and not plain:
        raise CheckpointError(
            f"{path} holds the weights of a plain module, {name}, which your own code builds: load it in Python with "
            f"sparsify.load(path, model={name.rpartition(':')[2].rpartition('.')[2]}(...))"
        )
    if "auto_map" in config and not _is_known_architecture(config) and not trust_remote_code:
        raise CheckpointError(
            f"{path} needs Python code that comes with the checkpoint, which is not run: use a model that "
            f"transformers knows itself, or pass --trust-remote-code (trust_remote_code=True) if you trust that code"
        )
    if weights:
        read_headers(weight_files(folder))
    return folder


def local_folder(path: str | Path) -> Path:
    """The folder of a checkpoint; one on the Hub is downloaded, pickles left out.

    Raises:
        CheckpointError: If it does not exist.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path} is a file: expected the folder of a checkpoint")
    if isinstance(path, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise CheckpointError(
            f"{path} does not exist: expected the folder of a checkpoint or a name on the Hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=_NOT_DOWNLOADED))
    except Exception as error:
        raise CheckpointError(
            f"{path} is neither a folder nor a checkpoint that the Hub gives us ({type(error).__name__}): check the "
            f"name, the network, and `hf auth whoami`"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint's `config.json`.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged (no mapping): fetch it again")
    return config


def module_class(config: Mapping[str, Any]) -> str | None:
    """The class that a plain module's `config.json` names; `None` for a checkpoint of transformers."""
    name = config.get(MODULE_CLASS)
    return name if isinstance(name, str) else None


def _is_known_architecture(config: Mapping[str, Any]) -> bool:
    import transformers

    return any(hasattr(transformers, name) for name in config.get("architectures") or [])
