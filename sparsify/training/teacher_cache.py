"""A teacher's outputs on a disk, computed once before the first step, so that training needs no teacher in memory.

One file holds the values of all samples one after the other, of each sample its hidden states layer by layer, then
logits, then embedding; a second one, written when the first is whole, says how many positions each of them has. What
is read is mapped into memory, so what fits there is read once. For data in a fixed form only: a masked language model
hides other words each time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparsify.errors import ConfigError, OutputError
from sparsify.runtime.progress import Progress
from sparsify.training.distillation import ROWS, Signals, Weights
from sparsify.training.samples import Batch, Samples
from sparsify.training.teacher import teacher_signals

VALUES, INDEX = "teacher.bin", "teacher.json"


def check_cacheable(task: str | None, streamed: bool) -> None:
    """Checks that the teacher's outputs can be computed before the first step.

    Raises:
        ConfigError: If the samples are not the same each time they are read, or other processes read them too.
    """
    why = None
    if task == "masked-lm":
        why = "a masked language model hides other words in each batch"
    elif streamed:
        why = "the data are streamed"
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        why = "several processes train"
    if why is not None:
        raise ConfigError(f"distill.teacher_memory: cache cannot be used, since {why}; take offload or cpu")


def numbered(samples: Samples) -> Samples:
    """The same samples; their batches tell which rows of the data set they hold."""

    def collate(rows: Sequence[tuple[int, Any]]) -> Batch:
        batch = dict(samples.collate([row for _, row in rows]))
        batch[ROWS] = torch.tensor([index for index, _ in rows])
        return batch

    return replace(samples, dataset=_Numbered(samples.dataset), collate=collate)


class _Numbered(Dataset):
    """Rows with their numbers."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._dataset[index]


@dataclass(frozen=True)
class _Layout:
    """Where what is.

    Attributes:
        dtype: Dtype of the values.
        widths: Numbers in one position of each tensor: hidden states, then logits, then embedding.
        hidden: How many of the tensors are hidden states.
        logits: Whether logits come after them.
        parts: Rows of a batch that one sample makes: 2 for pairs of sentences.
        counts: Positions of each tensor of each entry; entry `sample * parts + part`.
    """

    dtype: str
    widths: list[int]
    hidden: int
    logits: bool
    parts: int
    counts: list[list[int]]

    def starts(self) -> list[int]:
        """Where each entry begins, and the last one ends, in values."""
        sizes = (
            sum(n * width for n, width in zip(counts, self.widths, strict=True)) for counts in self.counts
        )
        return list(accumulate(sizes, initial=0))


class CachedTeacher:
    """A teacher whose outputs are on the disk.

    Args:
        folder: Where `write` put them.
    """

    def __init__(self, folder: Path) -> None:
        self._layout = layout = _Layout(**json.loads((folder / INDEX).read_text(encoding="utf-8")))
        self._starts = layout.starts()
        dtype = getattr(torch, layout.dtype)
        self._values = torch.from_file(str(folder / VALUES), shared=False, size=self._starts[-1], dtype=dtype)

    @property
    def samples(self) -> int:
        """Samples whose outputs are there."""
        return len(self._layout.counts) // self._layout.parts

    def __call__(self, batch: Batch, weights: Weights) -> Signals:
        """The signals of a batch of `numbered` samples, on the batch's device."""
        layout, device = self._layout, batch[ROWS].device
        entries = [row * layout.parts + part for part in range(layout.parts) for row in batch[ROWS].tolist()]
        found: list[list[Tensor]] = [[] for _ in layout.widths]
        for entry in entries:
            begin = self._starts[entry]
            for tensors, count, width in zip(found, layout.counts[entry], layout.widths, strict=True):
                tensors.append(self._values[begin : begin + count * width].view(count, width))
                begin += count * width
        whole = [torch.cat(tensors).to(device) for tensors in found]
        counts = [
            torch.tensor(column) for column in zip(*(layout.counts[entry] for entry in entries), strict=True)
        ]
        rest = whole[layout.hidden :]
        logits = rest.pop(0) if layout.logits else None
        return Signals(whole[: layout.hidden], logits, rest.pop(0) if rest else None, counts)


def cached(
    folder: Path,
    samples: Samples,
    weights: Weights,
    load: Callable[[], nn.Module],
    batch: int,
    progress: Progress | None = None,
) -> CachedTeacher:
    """The cached outputs for all samples; computed now unless an interrupted run left them in the folder.

    Args:
        folder: Where they are kept.
        samples: From `numbered`.
        weights: Terms that are 0 are not stored.
        load: Loads the teacher.
        batch: Samples in one forward pass of the teacher.
        progress: Told about every batch.

    Raises:
        OutputError: If the outputs do not fit on the disk.
    """
    if not (folder / INDEX).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, samples, weights, load(), batch, progress or Progress())
        except OSError as error:
            raise OutputError(
                f"cannot store the teacher's outputs in {folder}: {error.strerror or error}"
            ) from error
    return CachedTeacher(folder)


@torch.no_grad()
def _write(
    folder: Path, samples: Samples, weights: Weights, model: nn.Module, batch: int, progress: Progress
) -> None:
    total = len(samples.dataset)
    first: Signals | None = None
    counts: list[list[int]] = []
    parts, dtype = 1, "float32"
    task = progress.task("computing the teacher's outputs", total)
    with task as advance, (folder / VALUES).open("wb") as stream:
        for start in range(0, total, batch):
            rows = range(start, min(start + batch, total))
            inputs = samples.collate([samples.dataset[row] for row in rows])
            del inputs[ROWS]
            found = teacher_signals(model, inputs, weights)
            entries = _entries(found, len(rows))
            if first is None:
                first, parts = found, len(found.counts[0]) // len(rows)
                dtype = str(found.tensors[0].dtype).removeprefix("torch.")
                per_sample = sum(t.numel() * t.element_size() for entry in entries for t in entry) / len(rows)
                _check_space(folder, round(per_sample * total))
            for entry in entries:
                counts.append([len(tensor) for tensor in entry])
                for tensor in entry:
                    values = tensor.to(getattr(torch, dtype)).contiguous().flatten().cpu().view(torch.uint8)
                    values.numpy().tofile(stream)
            advance(len(rows))
    assert first is not None
    widths = [tensor.shape[-1] for tensor in first.tensors]
    layout = _Layout(dtype, widths, len(first.hidden), first.logits is not None, parts, counts)
    fresh = folder / f"{INDEX}.tmp"
    fresh.write_text(json.dumps(layout.__dict__), encoding="utf-8")
    fresh.replace(folder / INDEX)


def _entries(found: Signals, samples: int) -> list[list[Tensor]]:
    """The tensors of each entry, sample by sample, and of a sample part by part."""
    split = [tensor.split(count.tolist()) for tensor, count in zip(found.tensors, found.counts, strict=True)]
    rows = len(found.counts[0])
    order = [row for sample in range(samples) for row in range(sample, rows, samples)]
    return [[tensor[row] for tensor in split] for row in order]


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise OutputError(
            f"the teacher's outputs need {wanted / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free: take "
            f"fewer samples, a shorter length, or distill.teacher_memory: offload"
        )
