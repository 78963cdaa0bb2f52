"""Local reconstruction: training what is left of one transformer block to put out what the dense block did.

Once the masks of a block are set, its kept weights, biases and norms are trained for a few hundred steps, on inputs
that are there already: those which the pruned blocks before it give. What it should put out is what the dense model
puts out there, so that a block also makes up for what the ones before it have lost. Attention and MLP are trained
together, for what one of them gets wrong the other can often put right. The loss is the squared error over the squared
output, tokens of padding left out:

    loss = ||f'(x') - f(x)||^2 / ||f(x)||^2

Nothing but the block is in memory: no labels, no other blocks, no gradient from behind it. Weights are float32 while
they are trained, and each tensor's step is a share of its own root mean square, so that no learning rate needs to be
tuned for a model (as in Adafactor, Shazeer & Stern 2018).

A part of the calibration data is held back, and the weights with the lowest error on it are kept: with few data
those of an early step, and where training never helps the block stays as it was.

Sources: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (2021); for
pruned language models Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.blocks import BlockMask
from sparsify.calibration.walk import Block
from sparsify.errors import PrunerError
from sparsify.runtime.progress import Advance

RATE = 0.03  # largest step, as a share of a tensor's root mean square
WARMUP = 20  # steps
HELD_BACK = 8  # one batch in so many is not trained on
LEAST_RMS = 1e-3  # of a tensor that starts at zero, such as a bias
CHECKS = 12  # how often the error on them is looked at


@dataclass(frozen=True)
class Reconstructed:
    """Relative squared error of a block's output on the batches held back, before and after.

    Attributes:
        block: The block's name.
        before: With the masks set.
        after: With the best weights that training found; equal to `before` if it did not help.
    """

    block: str
    before: float
    after: float

    def __str__(self) -> str:
        if self.after < self.before:
            return f"{self.block}: output error {self.before:.2%} -> {self.after:.2%}"
        return f"{self.block}: output error {self.before:.2%} as before; more calibration data may help"


def reconstruct(
    block: Block, masks: Mapping[str, BlockMask], steps: int, advance: Advance, seed: int = 0
) -> Reconstructed:
    """Trains the parameters of a block whose removed weights are zero, in place; they stay zero.

    Args:
        block: The block in hand, with its inputs in the dense model.
        masks: Masks by layer name.
        steps: Optimizer steps, of one calibration batch each.
        advance: Told about each of them.
        seed: Of the order of the batches.

    Raises:
        PrunerError: If what the block puts out is not finite.
    """
    calls = range(len(block.calls))
    held = [i for i in calls if i % HELD_BACK == HELD_BACK - 1] or list(calls)
    trained = [i for i in calls if i not in held] or list(calls)
    keep = {id(layer.parameter): [] for layer in block.layers}
    for layer in block.layers:
        keep[id(layer.parameter)].append((layer, masks[layer.name].elements().to(layer.weight.device)))
    own = {n: p for n, p in block.module.named_parameters() if p.is_floating_point()}
    weights = {n: p.detach().to(torch.float32, copy=True).requires_grad_() for n, p in own.items()}
    targets = {i: block.dense_output(i) for i in calls}

    def loss(index: int) -> Tensor:
        given = block.output(index, {n: w.to(own[n].dtype) for n, w in weights.items()})
        tokens = block.valid(index, given)
        wanted = targets[index].to(given.device)[tokens].float()
        return (given[tokens].float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-20)

    def error() -> float:
        with torch.no_grad():
            return sum(float(loss(index)) for index in held) / len(held)

    def prune() -> None:
        for name, parameter in own.items():
            for layer, kept in keep.get(id(parameter), ()):
                layer.matrix(weights[name].detach()).mul_(kept)

    before = error()
    if not math.isfinite(before):
        raise PrunerError(
            f"block {block.name} puts out NaN or infinity for the calibration data: "
            f"run the model in a wider dtype, or look for damaged weights"
        )
    groups = [{"params": [w], "rate": RATE * max(_rms(w), LEAST_RMS)} for w in weights.values()]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    best, found = before, {}
    for step in range(1, steps + 1):
        order = order or torch.randperm(len(trained), generator=generator).tolist()
        share = min(1.0, step / WARMUP) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(trained[order.pop()]).backward()
        optimizer.step()
        prune()
        advance()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            now = error()
            if not math.isfinite(now):
                advance(steps - step)
                break
            if now < best:
                best, found = now, {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in found.items():
        own[name].detach().copy_(weight)
    return Reconstructed(block.name, before, best)


def _rms(weight: Tensor) -> float:
    """Root mean square of what is not zero."""
    kept = weight.detach()[weight.detach() != 0]
    return float(kept.square().mean().sqrt()) if kept.numel() else 0.0
