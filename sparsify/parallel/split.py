"""One rank's part of a layer, and the layer again from the parts of all ranks.

A part holds some outputs of a layer (`"outputs"`: a split by columns in the words of Megatron-LM, whose matrices are
transposed) or works on some of its inputs (`"inputs"`: a split by rows). Which ones is said in whole steps: block rows
or block columns of a block-sparse layer, single rows or columns of a dense one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockMask
from sparsify.layers.linear import BlockSparseLinear

Side = Literal["outputs", "inputs"]
# What can be split: exactly these classes, since what somebody derives from them may compute something else.
SPLITTABLE = (nn.Linear, BlockSparseLinear)


@dataclass(frozen=True)
class Split:
    """How one layer is divided.

    Attributes:
        side: Which features are divided: `outputs` or `inputs`.
        size: Number of them in the whole layer.
        step: Features of one step: a block's side, 1 in a dense layer.
        steps: The steps of each rank, ascending.
    """

    side: Side
    size: int
    step: int
    steps: tuple[Tensor, ...]

    def features(self, rank: int) -> Tensor:
        """Numbers of one rank's features in the whole layer, in its order."""
        wide = self.steps[rank][:, None] * self.step + torch.arange(self.step)
        return wide.flatten()[wide.flatten() < self.size]

    def widths(self) -> list[int]:
        """Number of features of each rank."""
        return [self.features(rank).numel() for rank in range(len(self.steps))]


def step_of(layer: nn.Module, side: Side) -> int:
    """The smallest number of features that can be taken out of a layer: a block's side, or 1."""
    if isinstance(layer, BlockSparseLinear):
        return layer.block_shape.rows if side == "outputs" else layer.block_shape.cols
    return 1


def features_of(layer: nn.Module, side: Side) -> int:
    """Number of outputs or inputs of a layer."""
    size = layer.out_features if side == "outputs" else layer.in_features
    assert isinstance(size, int)
    return size


def costs(layer: nn.Module, side: Side, width: int) -> Tensor:
    """Stored elements for every `width` features, `(ceil(features / width),)` float64; whole steps each.

    Args:
        layer: Dense or block-sparse.
        side: Which features.
        width: Features of one entry, a multiple of `step_of(layer, side)`.
    """
    if isinstance(layer, BlockSparseLinear):
        block = layer.block_shape.rows * layer.block_shape.cols
        stored = layer.mask.keep.cpu().sum(1 if side == "outputs" else 0).double() * block
    else:
        other = features_of(layer, "inputs" if side == "outputs" else "outputs")
        stored = torch.full((features_of(layer, side),), other, dtype=torch.float64)
    together = width // step_of(layer, side)
    padded = nn.functional.pad(stored, (0, -stored.numel() % together))
    return padded.view(-1, together).sum(1)


def part_of(layer: nn.Module, split: Split, rank: int) -> nn.Module:
    """One rank's part of a layer, a layer of the same class; weights are copied, `requires_grad` is kept.

    A bias of a layer divided by inputs belongs to the sum of the parts, so the first rank alone has it.
    """
    assert isinstance(layer, SPLITTABLE)
    bias = None
    if layer.bias is not None and (split.side == "outputs" or rank == 0):
        bias = layer.bias.detach()
        if split.side == "outputs":
            bias = bias[split.features(rank).to(bias.device)]
        bias = nn.Parameter(bias.clone(), requires_grad=layer.bias.requires_grad)
    part = _sparse_part if isinstance(layer, BlockSparseLinear) else _dense_part
    return part(layer, bias, split, rank).train(layer.training)  # pyright: ignore[reportArgumentType]


def _dense_part(layer: nn.Linear, bias: nn.Parameter | None, split: Split, rank: int) -> nn.Linear:
    features = split.features(rank).to(layer.weight.device)
    weight = layer.weight.detach().index_select(0 if split.side == "outputs" else 1, features)
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    part.weight, part.bias = nn.Parameter(weight, requires_grad=layer.weight.requires_grad), bias  # pyright: ignore[reportAttributeAccessIssue]
    return part


def _sparse_part(
    layer: BlockSparseLinear, bias: nn.Parameter | None, split: Split, rank: int
) -> BlockSparseLinear:
    keep = layer.mask.keep
    steps, width = split.steps[rank].to(keep.device), split.features(rank).numel()
    chosen = torch.zeros_like(keep)
    if split.side == "outputs":
        chosen[steps] = True
        own = BlockMask(keep[steps], (width, layer.in_features), layer.block_shape)
    else:
        chosen[:, steps] = True
        own = BlockMask(keep[:, steps], (layer.out_features, width), layer.block_shape)
    # Blocks lie row by row and steps ascend: those of a part lie in the order of the whole.
    values = layer.weight.detach()[chosen[keep]]
    part = BlockSparseLinear.from_packed(
        nn.Parameter(values, requires_grad=layer.weight.requires_grad), bias, own
    )
    part.transposed = layer.transposed
    return part


def whole_tensors(
    parts: Sequence[Mapping[str, Tensor]], split: Split, grid: tuple[int, int] | None
) -> dict[str, Tensor]:
    """The state of the whole layer.

    Args:
        parts: State of each rank's part, in the order of the ranks, all on one device.
        split: How the layer was divided.
        grid: Block rows and block columns of the whole layer, `None` of a dense one.
    """
    whole: dict[str, Tensor] = {}
    if "bias" in parts[0]:
        whole["bias"] = parts[0]["bias"]
        if split.side == "outputs":
            whole["bias"] = _placed([part["bias"] for part in parts], split, 0)
    if grid is None:
        whole["weight"] = _placed(
            [part["weight"] for part in parts], split, 0 if split.side == "outputs" else 1
        )
        return whole
    rows, cols = [], []
    for part, steps in zip(parts, split.steps, strict=True):
        crow, col = part["crow_indices"], part["col_indices"].long()
        row = torch.repeat_interleave(torch.arange(crow.numel() - 1, device=crow.device), crow.diff().long())
        steps = steps.to(crow.device)
        rows.append(steps[row] if split.side == "outputs" else row)
        cols.append(col if split.side == "outputs" else steps[col])
    row, col = torch.cat(rows), torch.cat(cols)
    order = torch.argsort(row * grid[1] + col)
    counts = torch.bincount(row, minlength=grid[0])
    whole["weight"] = torch.cat([part["weight"] for part in parts])[order]
    whole["crow_indices"] = nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    whole["col_indices"] = col[order].to(torch.int32)
    return whole


def _placed(parts: list[Tensor], split: Split, dim: int) -> Tensor:
    joined = torch.cat(parts, dim)
    order = torch.argsort(torch.cat([split.features(rank) for rank in range(len(parts))]))
    return joined.index_select(dim, order.to(joined.device))
