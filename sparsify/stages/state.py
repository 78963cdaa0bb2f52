"""What one stage hands to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.blocks import BlockMask
from sparsify.calibration.cache import WalkCache
from sparsify.layers.swap import masks_of, sparse_modules
from sparsify.recipe.schema import Recipe
from sparsify.runtime.progress import Progress
from sparsify.targets import KeptDense


@dataclass
class State:
    """The state of a run between two stages.

    Attributes:
        recipe: The recipe.
        model: The transformers model. Where `masks` says so, its weights are zero, or its layers packed.
        processor: Its tokenizer or image processor, if it has one.
        task: The task, never `auto`; `None` where the model is of no task that can be trained or scored.
        device: Where the model is.
        progress: Told about everything that takes long.
        index: Position of the stage that runs, from 0.
        masks: Masks in force, by the name of the matrix.
        kept_dense: Layers that the last pruning left dense, and why.
        slower: Masked layers that stay dense because they would run slower block-sparse, and the reason in words.
        statistics: Calibration statistics, by layer name, for a pruner that works while the model is trained.
        calibration: Batches for a pruner that works at once, and walks through the model with them.
        cache: What such a walk stores.
        permuted: What reordering units gained, `{"stage": index, ...}` (see `sparsify.permutation.gain`).
        columns: Measurements by label, in order.
        history: Loss histories: `{"stage": index, "points": [...]}`.
        notes: What `auto` chose, in words.
        choices: What `auto` chose, to be chosen again after an interruption.
        report: The finished report.
        trained: Whether weights have been trained since the last masks.
        changed: Whether the weights differ from the source by more than masks and packing.
        trainer_folder: Folder for the Trainer's checkpoints of the stage that runs.
        teacher: The dense model as an earlier stage trained it, if the stage that runs learns from that.
        resume: The Trainer's checkpoint from which the stage that runs goes on.
        keep: Stores the state, so that an interruption from here on loses nothing before it.
    """

    recipe: Recipe
    model: Any
    processor: Any
    task: str | None
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    index: int = 0
    masks: dict[str, BlockMask] = field(default_factory=dict)
    kept_dense: list[KeptDense] = field(default_factory=list)
    slower: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    calibration: list[dict[str, Tensor]] | None = None
    cache: WalkCache | None = None
    permuted: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    trained: bool = False
    changed: bool = False
    trainer_folder: Path = Path("trainer")
    teacher: Path | None = None
    resume: Path | None = None
    keep: Callable[[], None] = lambda: None

    @property
    def packed(self) -> bool:
        """Whether the model has block-sparse layers, and every masked one that is dense is meant to be."""
        return bool(sparse_modules(self.model)) and self.dense_masks.keys() <= self.slower.keys()

    @property
    def dense_masks(self) -> dict[str, BlockMask]:
        """The masks in force whose weights are not packed yet, by the name of the matrix."""
        done = masks_of(self.model)
        return {name: mask for name, mask in self.masks.items() if name not in done}

    def prune(self, masks: dict[str, BlockMask], kept_dense: list[KeptDense]) -> None:
        """Takes in the masks of a pruning; those that earlier prunings made for other weights stay in force."""
        self.masks = {**self.masks, **masks}
        self.slower = {name: why for name, why in self.slower.items() if name not in masks}
        names = [f"{name}." for name in self.masks]
        self.kept_dense = [
            kept for kept in kept_dense if not any(name.startswith(f"{kept.name}.") for name in names)
        ]
        self.statistics, self.calibration = {}, None

    def note(self, text: str) -> None:
        """Tells the user, and the report, about a choice."""
        self.notes.append(text)
        self.progress.note(text)
