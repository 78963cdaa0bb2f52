"""The safetensors files of a checkpoint folder, read by their headers alone: which tensors, and are they all there.

A safetensors file is eight bytes of header length, a JSON header, and the tensors' bytes without gaps; so its header
says how long the whole file must be, and a truncated download is seen before a single weight is read.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        file: The file that holds it.
        dtype: safetensors' name of the dtype: `F32`, `BF16`, `I32`, ...
        shape: Its shape.
        begin: Where its bytes begin in the file.
        nbytes: How many bytes it takes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads the names, shapes and places of a safetensors file's tensors.

    Raises:
        CheckpointError: If the file is missing, no safetensors file, or shorter or longer than its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file ({size} bytes): fetch it again"
                )
            header = json.loads(stream.read(length))
        tensors = _tensors(file, header, 8 + length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}; fetch it again") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} has a damaged safetensors header ({error}): fetch it again") from error
    expected = max((tensor.begin + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if expected != size:
        raise CheckpointError(
            f"{file} is {'truncated' if size < expected else 'damaged'}: {size} bytes, but its header describes "
            f"{expected}; fetch it again"
        )
    return tensors


def _tensors(file: Path, header: dict[str, Any], start: int) -> dict[str, StoredTensor]:
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (int(offset) for offset in entry["data_offsets"])
        if not 0 <= begin <= end:
            raise ValueError(f"offsets {begin}..{end} of {name}")
        shape = tuple(int(side) for side in entry["shape"])
        tensors[name] = StoredTensor(file, str(entry["dtype"]), shape, start + begin, end - begin)
    return tensors


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """All tensors of several safetensors files.

    Raises:
        CheckpointError: As `read_header`, or if a file is not safetensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file} is not a safetensors file: pickle checkpoints can run code when they are read and are not "
                f"loaded; convert it with save_pretrained of a program you trust"
            )
        tensors |= read_header(file)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `folder`, each known to exist.

    Raises:
        CheckpointError: If there are none (also when there is only a pickle), or a shard of the index is missing.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}): fetch it again") from error
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(shards)} weight files that {INDEX_FILE} names, "
                f"the first is {missing[0]}: fetch them again"
            )
        return [folder / name for name in shards]
    pickles = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickle weights ({pickles[0]}), which can run code when they are read and are not "
            f"loaded: convert it to safetensors first, with save_pretrained of a program you trust"
        )
    raise CheckpointError(f"{folder} holds no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}")
