"""Block OBS: whole blocks go by the output error they leave behind, and the weights that stay make up for them.

With `X` `(tokens, K)` the inputs of a layer and `H = X^T X / tokens`, a changed weight `W'` is off by
`tr((W - W') H (W - W')^T)`, the mean squared error of the output. Every block row of `bo` outputs is a problem of its
own with the same `H`. If one of its blocks `W_B` `(bo, bi)` goes, and all other weights of the row are free to adjust,
then (Hassibi & Stork, "Optimal Brain Surgeon", 1993; for groups of weights Kurtic et al., "The Optimal BERT Surgeon",
2022)

    error(B)   = tr( W_B  (Hinv_BB)^-1  W_B^T )
    W_row     -= W_B (Hinv_BB)^-1 Hinv_B:
    Hinv      -= Hinv_:B (Hinv_BB)^-1 Hinv_B:         the inverse of H without B's rows and columns

**Scores.** Each block row is emptied step by step, as the optimal brain compressor does with single weights (Frantar &
Alistarh 2022): the cheapest blocks go, weights and inverse are updated, the errors of the others are estimated anew. A
block's score is its error at the time it went, made non-decreasing, so that any budget takes the blocks of a row in
that order. To compare layers it is divided by the layer's mean squared output and by the block's own elements: the
share of the output lost for each element saved.

**Weights.** For the masks that the budget chose the best kept weights of a block row with kept columns S are exactly

    W'_S = W H_:S (H_SS)^-1

which is what the updates above add up to. Layers are adjusted one after the other, to the inputs `X` that the pruned
layers before them give. There the output to come near is that of the dense model, whose layer has the inputs `D`:

    W'_S = W C_:S (H_SS)^-1                           C = D^T X / tokens

so that each layer also makes up for what the ones before it have lost. Removing the blocks of a row all together, and
not in order as SparseGPT (Frantar & Alistarh 2023) does, costs one Cholesky factorisation for each block row, and
leaves no error of order.

`H` is dampened by `damping` times its mean diagonal, more where that is not enough to invert it. Inverse and solution
are float64; the emptying of rows, a K x K matrix each and many rows together, is float32.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.blocks import BlockMask, BlockShape, block_sizes
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner

MOST_DAMPING = 10.0  # times the mean diagonal; beyond it the inputs would no longer matter
WORKSPACE = 2**31  # bytes of inverses that are worked on together


class BlockOBS(Pruner):
    """Scores blocks by the second-order error of removing them, and adjusts the weights that stay.

    Args:
        damping: Added to the Hessian's diagonal, as a share of its mean; above 0. More of it trusts the calibration
            data less.
        steps: In how many steps a block row is emptied; the errors are estimated anew before each of them.
        update: Whether kept weights are adjusted for what goes.

    Raises:
        PrunerError: If an option is out of range.
    """

    name = "block_obs"
    requires = frozenset({"hessian"})

    def __init__(self, damping: float = 0.01, steps: int = 32, update: bool = True) -> None:
        if not 0.0 < damping <= MOST_DAMPING:
            raise PrunerError(f"damping {damping} is out of range: it must be above 0, such as 0.01")
        if not isinstance(steps, int) or steps < 1:
            raise PrunerError(f"steps {steps!r} is out of range: it is a whole number of at least 1")
        self.damping = damping
        self.steps = steps
        self.update = update

    @property
    def compensates(self) -> bool:
        """Whether kept weights are adjusted."""
        return self.update

    @property
    def compares(self) -> bool:
        """Whether what the layer put out in the dense model is wanted, for which `cross` is needed."""
        return self.update

    def score(self, layer: PrunableLayer) -> Tensor:
        """Relative output error for each element that removing a block saves, `(R, C)` float32.

        Raises:
            PrunerError: If the weight or the Hessian holds NaN or infinity.
        """
        cols = layer.grid[1]
        bi = layer.block.cols
        hessian, factor = self._hessian(layer)
        weight = _finite_weight(layer, hessian)
        energy = ((weight @ hessian) * weight).sum().clamp_min(torch.finfo(torch.float32).tiny)
        # Columns beyond the weight's edge are independent inputs whose weights are zero: they cost nothing.
        inverse = torch.block_diag(
            torch.cholesky_inverse(factor),
            torch.eye(cols * bi - layer.shape[1], dtype=factor.dtype, device=factor.device),
        )
        del hessian, factor
        weight = functional.pad(weight, (0, cols * bi - layer.shape[1]))
        at_once = -(-cols // self.steps)
        try:
            errors = _empty_rows(weight.float(), inverse.float(), layer.block, at_once)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage] -- too much lost in float32
            errors = _empty_rows(weight, inverse, layer.block, at_once)
        return (errors / energy / block_sizes(layer.shape, layer.block).to(errors.device)).float()

    def update_weights(self, layer: PrunableLayer, mask: BlockMask) -> None:
        """Solves for the kept weights of each block row."""
        if not self.update or bool(mask.keep.all()):
            return
        hessian, _ = self._hessian(layer)
        weight = _finite_weight(layer, hessian)
        wanted = weight @ hessian
        if "cross" in layer.statistics:  # the dampened one, as the Hessian is
            wanted += weight @ (layer.statistics["cross"] - layer.statistics["hessian"]).to(hessian)
        widths = block_sizes(layer.shape, layer.block)[0] // min(layer.block.rows, layer.shape[0])
        for rows, part, keep in zip(
            weight.split(layer.block.rows), wanted.split(layer.block.rows), mask.keep.cpu(), strict=True
        ):
            columns = keep.repeat_interleave(widths).nonzero().flatten().to(weight.device)
            rows.zero_()
            if columns.numel():
                factor = torch.linalg.cholesky(hessian[columns[:, None], columns])
                rows[:, columns] = torch.cholesky_solve(part[:, columns].t(), factor).t()
        layer.weight.copy_(weight)

    def _hessian(self, layer: PrunableLayer) -> tuple[Tensor, Tensor]:
        """The dampened Hessian `(K, K)` float64 on the weight's device, and its lower Cholesky factor."""
        hessian = layer.statistics["hessian"].to(layer.weight.device, torch.float64, copy=True)
        mean = hessian.diagonal().mean()
        if not bool(torch.isfinite(hessian).all()):
            raise PrunerError(
                f"calibration inputs of layer {layer.name} hold NaN or infinity: look for damaged weights before it, "
                f"or run the model in a wider dtype"
            )
        if (
            mean == 0
        ):  # nothing but zeros came in, or (in an expert) nothing at all: every feature counts alike
            hessian.diagonal().fill_(1.0)
            return hessian, hessian.clone()
        damping, added = self.damping, 0.0
        while True:
            hessian.diagonal().add_((damping - added) * mean)
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                break
            if damping >= MOST_DAMPING:
                raise PrunerError(
                    f"the Hessian of layer {layer.name} is not positive: its calibration is damaged"
                )
            damping, added = min(10 * damping, MOST_DAMPING), damping
        if damping > self.damping:
            logging.getLogger("sparsify").warning(
                "the Hessian of layer %s is singular: dampened by %g of its mean diagonal instead of %g",
                *(layer.name, damping, self.damping),
            )
        return hessian, factor


def _finite_weight(layer: PrunableLayer, like: Tensor) -> Tensor:
    weight = layer.weight.to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(weight).all()):
        raise PrunerError(f"weights of layer {layer.name} hold NaN or infinity: the checkpoint is damaged")
    return weight


def _empty_rows(weight: Tensor, inverse: Tensor, block: BlockShape, at_once: int) -> Tensor:
    """Errors `(R, C)` of all blocks of a weight `(N, C * bi)`, as many block rows at a time as memory allows."""
    rows = functional.pad(weight, (0, 0, 0, -weight.shape[0] % block.rows)).unflatten(0, (-1, block.rows))
    chunk = max(1, WORKSPACE // (2 * inverse.nbytes))
    return torch.cat([empty_rows(part, inverse, block.cols, at_once) for part in rows.split(chunk)])


def empty_rows(weight: Tensor, inverse: Tensor, width: int, at_once: int = 1) -> Tensor:
    """Removes the blocks of each block row, the cheapest first, until none is left.

    Args:
        weight: `(R, bo, C * width)`, block rows of the weight.
        inverse: `(C * width, C * width)`, inverse of the Hessian of their inputs.
        width: Columns of a block, `bi`.
        at_once: Blocks of a row that go before the errors of the others are estimated anew.

    Returns:
        Error of each block when it went, `(R, C)`, made non-decreasing in the order of removal.
    """
    count, size = len(weight), inverse.shape[0] // width
    errors = weight.new_zeros(count, size)
    left = torch.arange(size, device=weight.device).expand(count, -1)
    worst = weight.new_zeros(count, 1)
    inverse = inverse.expand(count, -1, -1)
    each = torch.arange(count, device=weight.device)[:, None, None]
    while left.shape[1]:
        blocks = weight.unflatten(2, (-1, width))  # (R, bo, c, bi)
        own = inverse.unflatten(2, (-1, width)).unflatten(1, (-1, width)).diagonal(dim1=1, dim2=3)
        factor = torch.linalg.cholesky(own.permute(0, 3, 1, 2))  # (R, c, bi, bi)
        whitened = torch.linalg.solve_triangular(factor, blocks.permute(0, 2, 3, 1), upper=False)
        error = whitened.square().sum((2, 3))
        order = error.argsort(dim=1, stable=True)
        gone, stay = order[:, :at_once], order[:, at_once:].sort(dim=1).values
        cost = torch.maximum(error.gather(1, gone), worst)
        errors.scatter_(1, left.gather(1, gone), cost)
        worst = cost.amax(1, keepdim=True)
        left = left.gather(1, stay)
        if not left.shape[1]:
            break
        removed, kept = _columns(gone, width), _columns(stay, width)
        cross = inverse[each, kept[:, :, None], removed[:, None, :]]  # (R, k, g)
        pivot = torch.linalg.cholesky(inverse[each, removed[:, :, None], removed[:, None, :]])
        solved = torch.cholesky_solve(cross.mT, pivot)
        lost = weight.gather(2, removed[:, None].expand(-1, weight.shape[1], -1))
        weight = weight.gather(2, kept[:, None].expand(-1, weight.shape[1], -1)).baddbmm(
            lost, solved, alpha=-1
        )
        inverse = inverse[each, kept[:, :, None], kept[:, None, :]].baddbmm_(cross, solved, alpha=-1)
    return errors


def _columns(blocks: Tensor, width: int) -> Tensor:
    """Columns `(R, n * width)` that the blocks `(R, n)` of each row cover, in order."""
    return (blocks[..., None] * width + torch.arange(width, device=blocks.device)).flatten(1)
