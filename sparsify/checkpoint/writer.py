"""Writing a checkpoint: all of it or nothing.

Everything is written to a folder beside the target and renamed when complete, so that an interrupted or failed run
leaves neither half a checkpoint nor a damaged old one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from sparsify.checkpoint import plain
from sparsify.checkpoint.format import RECIPE_FILE, REPORT_FILE, REPORT_PAGE
from sparsify.errors import OutputError
from sparsify.layers.swap import sparse_modules

SMALL_FILES_BYTES = 32 * 2**20  # config, tokenizer, recipe and report, generously


def save(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    recipe: str | None = None,
    report: Mapping[str, Any] | None = None,
    page: str | None = None,
    force: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a model as a checkpoint folder that `from_pretrained` reads, or a plain module as one that `load` reads.

    Args:
        model: A transformers model or any module, with block-sparse layers or dense (also while it is masked).
        out: Folder to write; it must not exist, or be empty.
        tokenizer: Tokenizer to save beside the weights.
        processor: Image processor, feature extractor or processor to save beside the weights.
        recipe: YAML text of the recipe that made the model.
        report: What the run measured, JSON values.
        page: The same for people, HTML.
        force: Replace an existing checkpoint in `out`. The old one stays until the new one is complete.
        max_shard_size: Largest weight file, in bytes or as in `"5GB"`.

    Returns:
        The folder written, absolute.

    Raises:
        OutputError: If `out` exists, is no checkpoint (with `force`), cannot be written or does not fit on its disk.
        ConfigError: If `model` cannot be written: a `torch.jit` module, a wrapper, an adapter.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        plain.check_savable(model)
    check_output(out, force, weight_bytes(model))
    if isinstance(model, PreTrainedModel) and sparse_modules(model):
        from sparsify.checkpoint.quantizer import attach

        attach(model)
    with new_folder(Path(out).expanduser().resolve(), force) as folder:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            plain.write(model, folder, max_shard_size)
        for part in (tokenizer, processor):
            if part is not None:
                part.save_pretrained(folder)
        if recipe is not None:
            (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        if report is not None:
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if page is not None:
            (folder / REPORT_PAGE).write_text(page, encoding="utf-8")
        _copy_sentence_transformers(Path(getattr(model, "name_or_path", None) or ""), folder)
    return Path(out).expanduser().resolve()


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take on disk, tied ones counted once."""
    tensors = {(t.data_ptr() if t.device.type != "meta" else id(t)): t for t in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_output(out: str | Path, force: bool, needed: int) -> None:
    """Checks, before any work, that a checkpoint can be written to `out`.

    Args:
        out: Folder to write.
        force: Whether an existing checkpoint may be replaced.
        needed: Bytes of the weights to write.

    Raises:
        OutputError: If it exists, cannot be written, or is too small a disk.
    """
    path = Path(out).expanduser().resolve()
    if path.exists():
        if not path.is_dir():
            raise OutputError(f"{path} is a file: choose a folder that does not exist yet")
        if os.path.ismount(path):
            raise OutputError(f"{path} is a mount point, which cannot be replaced: choose a folder inside it")
        if not force and any(path.iterdir()):
            raise OutputError(
                f"{path} exists: choose another folder, or pass --force (force=True) to replace it"
            )
        if any(path.iterdir()) and not _is_checkpoint(path):
            raise OutputError(
                f"{path} exists and is no checkpoint, so it is not replaced: choose another folder"
            )
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {parent}: choose another output folder or change its permissions")
    free, needed = shutil.disk_usage(parent).free, needed + SMALL_FILES_BYTES
    if free < needed:
        raise OutputError(
            f"{path} needs about {_size(needed)}, but its disk has {_size(free)} left: free some space or choose "
            f"another folder"
        )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


@contextmanager
def new_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder to write to, which becomes `path` if the block ends well and vanishes if not."""
    folder = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
        for file in folder.rglob("*"):
            _flush(file)
        _put_in_place(folder, path, force)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, path: Path, force: bool) -> None:
    old = path.with_name(f"{path.name}.old-{os.getpid()}")
    if path.exists() and any(path.iterdir()):
        if not force:
            raise OutputError(f"{path} appeared while it was being written: choose another folder")
        path.rename(old)
    try:
        folder.rename(path)
        _flush(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_sentence_transformers(source: Path, folder: Path) -> None:
    """Brings along what turns an encoder into a sentence encoder (pooling and so on), if the model came with it."""
    listing = source / "modules.json"
    if not source.name or not listing.is_file():
        return
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
    paths = [str(module.get("path", "")) for module in json.loads(listing.read_text(encoding="utf-8"))]
    for name in names:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)
    for name in paths:
        # The module without a path is the transformer itself, which has just been written.
        if name and (source / name).is_dir() and (source / name).resolve().is_relative_to(source.resolve()):
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
