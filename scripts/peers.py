"""What others remove: single weights instead of blocks, as their papers say, for the tables of the pruners.

All of them walk the model as our own pruners do (`sparsify.calibration.sequential`), one transformer block at a time,
with each layer's inputs as the pruned layers before it leave them. A pattern is `unstructured`, or `2:4`: of
every four inputs of an output, two. None of the results can be stored in blocks, and only `2:4` has a GPU instruction.

- `Magnitude`: the smallest weights of a layer go.
- `Wanda` (Sun, Liu, Bair, Kolter 2024): of each output, the weights with the smallest `|w| ||x||`.
- `SparseGPT` (Frantar & Alistarh 2023): columns from the left to the right, the weights with the smallest
  `w^2 / [Hinv]_jj^2` of a group of columns go, and the columns behind make up for them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import sparsify
from sparsify import BlockMask, Pruner
from sparsify.pruner import PrunableLayer

GROUP = 128  # columns that SparseGPT chooses together
DAMPING = 0.01


class Peer(Pruner):
    """Removes single weights when it is asked to adjust a layer; no block ever goes."""

    def __init__(self, share: float, pattern: str = "unstructured") -> None:
        self.share, self.pattern = share, pattern

    def score(self, layer: PrunableLayer) -> Tensor:
        """Nothing to choose from: all blocks stay."""
        return torch.zeros(layer.grid, device=layer.weight.device)

    def update_weights(self, layer: PrunableLayer, mask: BlockMask) -> None:
        """Removes the layer's weights."""
        layer.weight.copy_(self.pruned(layer.weight.float(), layer.statistics))

    @abstractmethod
    def pruned(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """The pruned weight `(N, K)`."""

    def lowest(self, score: Tensor, by_output: bool) -> Tensor:
        """Which entries of `(N, K)` go, bool: the lowest of each output, or of all; of every four under 2:4."""
        if self.pattern == "2:4":
            groups = score.unflatten(1, (-1, 4))
            order = groups.argsort(dim=2, stable=True)
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :2], True).flatten(1)
        flat = score if by_output else score.flatten()[None]
        order = flat.argsort(dim=1, stable=True)[:, : round(self.share * flat.shape[1])]
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True).view_as(score)


class Magnitude(Peer):
    def pruned(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        return weight.masked_fill(self.lowest(weight.abs(), by_output=False), 0)


class Wanda(Peer):
    requires = frozenset({"input_sq"})

    def pruned(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        score = weight.abs() * statistics["input_sq"].to(weight.device).sqrt()
        return weight.masked_fill(self.lowest(score, by_output=True), 0)


class SparseGPT(Peer):
    requires = frozenset({"hessian"})

    def pruned(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        hessian = statistics["hessian"].to(weight.device, torch.float64, copy=True)
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
        weight = weight.clone()
        for start in range(0, weight.shape[1], GROUP):
            group = slice(start, min(start + GROUP, weight.shape[1]))
            own, factor = weight[:, group], upper[group, group]
            gone = self.lowest(own.square() / factor.diagonal().square(), by_output=False)
            errors = torch.zeros_like(own)
            for column in range(own.shape[1]):
                errors[:, column] = own[:, column] * gone[:, column] / factor[column, column]
                own[:, column:] -= errors[:, column, None] * factor[column, column:]
                own[:, column].masked_fill_(gone[:, column], 0)
            weight[:, group.stop :] -= errors @ upper[group, group.stop :]
        return weight


PEERS = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}


def prune(
    model: nn.Module, method: str, sparsity: float, pattern: str, batches: Iterable[Mapping[str, Any]]
) -> None:
    """Prunes the layers that `sparsify.prune` would prune, in place."""
    sparsify.prune(
        model,
        method=f"{__name__}:{PEERS[method].__name__}",
        block=8,  # any that fits all layers: no block is removed
        sparsity=0.0,
        calibration=batches,
        convert=False,
        share=sparsity,
        pattern=pattern,
    )
