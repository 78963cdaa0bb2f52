"""The weights that a tuning measures: the distinct ones of a checkpoint, or random ones of given shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.blocks import BlockMask, BlockShape
from sparsify.checkpoint import reader
from sparsify.errors import ConfigError
from sparsify.kernels.convolution.ops import pointwise
from sparsify.kernels.tuning_files import Entry
from sparsify.layers.convolution import BlockSparseConv
from sparsify.layers.kinds import dense_kind, every_matrix, is_sparse
from sparsify.plan import skeleton
from sparsify.recipe.schema import Recipe
from sparsify.targets import select

# Layers whose densities differ by less than this are measured once: between densities times are interpolated.
DENSITY_STEP = 0.05

# Weights (N, K) of Llama-3-8B, Llama-3.2-1B, ViT-H and BERT-base, and all else that a shipped table is made of.
STANDARD_SHAPES = (
    (14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096),
    (8192, 2048), (2048, 8192), (2048, 2048), (512, 2048),
    (5120, 1280), (1280, 5120), (1280, 1280),
    (3072, 768), (768, 3072), (768, 768),
)  # fmt: skip
STANDARD_BLOCKS = ("128x128", "64x64", "256x16", "128x16", "32x32", "16x16")
STANDARD_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


NOTHING = "{} has no layer to tune: convolutions wider than a pixel have one kernel, which `sparsify bench` measures"


@dataclass(frozen=True)
class Case:
    """Weights that differ in nothing that matters for speed.

    Attributes:
        names: Their names; the shape where there is no model.
        mask: Kept blocks of the one that is measured.
        dtype: Of the weights.
    """

    names: tuple[str, ...]
    mask: BlockMask
    dtype: torch.dtype

    def entry(
        self, op: str, tokens: int, dense: float = 1.0, times: Mapping[Any, float] | None = None
    ) -> Entry:
        """A measurement of this weight; without times one whose key alone counts."""
        dtype, block = str(self.dtype).removeprefix("torch."), (self.mask.block.rows, self.mask.block.cols)
        return Entry(
            op, dtype, block, self.mask.shape, round(self.mask.density, 3), tokens, dense, times or {}
        )


def of_model(
    model: str | Path,
    dtype: torch.dtype | None,
    blocks: Sequence[str] | None,
    sparsities: Sequence[float] | None,
    trust_remote_code: bool,
) -> list[Case]:
    """The distinct weights of a checkpoint, without loading any.

    Args:
        model: A block-sparse checkpoint, whose own masks count, or a dense one, which gets random masks.
        dtype: Instead of the checkpoint's.
        blocks: Block shapes of the random masks.
        sparsities: Sparsities of the random masks.
        trust_remote_code: Run the Python code that a dense checkpoint brings with it.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        ConfigError: If the checkpoint has masks of its own and others are asked for, or has none and none is.
    """
    if Path(model).expanduser().is_dir():
        reader.check_source(model, trust_remote_code, weights=False)
    values = {"model": str(model), "trust_remote_code": trust_remote_code}
    built: Any = skeleton(Recipe.from_dict({"version": 1, "stages": [{"stage": "prune"}]}, values=values))
    if any(is_sparse(module) for module in built.modules()):
        if blocks or sparsities:
            raise ConfigError(
                f"{model} is block-sparse and has masks of its own: leave out --block and --sparsity"
            )
        wider = _wider_than_a_pixel(built)
        masks = {name: mask for name, mask in reader.read_masks(model).items() if name not in wider}
        if not masks:
            raise ConfigError(NOTHING.format(model))
        return _distinct(masks, dtype or built.dtype)
    if not blocks or not sparsities:
        raise ConfigError(
            f"{model} is a dense checkpoint: say with --block and --sparsity, such as --block 64x64 --sparsity 0.75, "
            f"what its layers would become; or give a block-sparse one"
        )
    found: dict[tuple[int, int], list[str]] = {}
    wider = _wider_than_a_pixel(built)
    for layer in select(built, BlockShape(8, 8)).layers:
        if layer.name not in wider:
            found.setdefault(layer.shape, []).append(layer.name)
    if not found:
        raise ConfigError(NOTHING.format(model))
    named = [(tuple(names), shape) for shape, names in found.items()]
    return with_random_masks(named, dtype or built.dtype, blocks, sparsities)


def _wider_than_a_pixel(model: Any) -> set[str]:
    """Names of the matrices of convolutions that are no linear layers of pixels."""
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseConv) and not pointwise(module.geometry):
            names |= set(module.layout.names(name))
        elif dense_kind(module) == "convolution":
            single = module.groups == 1 and set(module.kernel_size) == {1}
            names |= set() if single else {layer.name for layer in every_matrix(name, module)}
    return names


def with_random_masks(
    named: Iterable[tuple[tuple[str, ...], tuple[int, int]]],
    dtype: torch.dtype,
    blocks: Sequence[str],
    sparsities: Sequence[float],
) -> list[Case]:
    """Weights `(N, K)` under uniformly random masks; one that is smaller than a block is left out.

    Raises:
        BlockShapeError: If a block shape is not supported.
        ConfigError: If a sparsity is out of range, or no weight is left.
    """
    if wrong := [sparsity for sparsity in sparsities if not 0 <= sparsity < 1]:
        raise ConfigError(f"sparsity: got {wrong[0]:g}, expected at least 0 and below 1")
    generator = torch.Generator().manual_seed(0)
    cases = []
    for names, shape in named:
        for block in map(BlockShape.parse, blocks):
            rows, cols = block.grid(shape)
            if shape[0] < block.rows or shape[1] < block.cols:
                continue
            for sparsity in sorted(set(sparsities)):
                kept = max(1, round((1 - sparsity) * rows * cols))
                keep = torch.randperm(rows * cols, generator=generator).view(rows, cols) < kept
                cases.append(Case(names, BlockMask(keep, shape, block), dtype))
    if not cases:
        raise ConfigError(f"nothing to tune: every weight is smaller than one block of {' or '.join(blocks)}")
    return cases


def _distinct(masks: Mapping[str, BlockMask], dtype: torch.dtype) -> list[Case]:
    """Weights by shape, block shape and rounded density; the one of median density stands for the others."""
    groups: dict[Any, list[tuple[float, str]]] = {}
    for name, mask in masks.items():
        key = mask.shape, mask.block, round(mask.density / DENSITY_STEP)
        groups.setdefault(key, []).append((mask.density, name))
    cases = []
    for members in groups.values():
        members.sort()
        middle = members[len(members) // 2][1]
        cases.append(Case(tuple(name for _, name in members), masks[middle], dtype))
    return cases
