"""Pruning with calibration data, one transformer block at a time.

There are at most two walks over the model's blocks (`walk`), because a budget over all layers can only
be split once every score is known:

1. over the dense model: statistics and scores of every layer. No weight changes. Scores are kept in the cache, so that
   another sparsity, scope or bound starts from them, and an interrupted walk goes on behind the last finished block;
2. only if kept weights change: the masks are fixed, and each layer is adjusted to the inputs that the pruned layers
   before it give. Within a block, layers that share an input go together, in the order in which they run, and
   statistics are of one such group. Then the whole block is reconstructed (`reconstruction`), if wanted.
   Finished blocks are kept in the cache until the walk is over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.allocation.budget import Budget, checked_score
from sparsify.blocks import BlockMask
from sparsify.calibration.cache import WalkCache
from sparsify.calibration.reconstruction import reconstruct as reconstruct_block
from sparsify.calibration.statistics import checked_batches, needs_calibration
from sparsify.calibration.walk import Batch, Block, Walk
from sparsify.pruner import PrunableLayer, Pruner
from sparsify.runtime.progress import Progress

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@torch.no_grad()
def prune_in_walks(
    model: nn.Module,
    pruner: Pruner,
    layers: Sequence[PrunableLayer],
    budget: Budget,
    batches: Iterable[Mapping[str, Any]],
    *,
    reconstruct: int = 0,
    device: torch.device | str | None = None,
    cache: WalkCache | None = None,
    progress: Progress | None = None,
) -> dict[str, BlockMask]:
    """Scores all layers, chooses the masks, adjusts kept weights where the pruner does that, and zeroes the rest.

    No weight changes before every score is known to be good.

    Args:
        model: The dense model.
        pruner: Any pruner.
        layers: What to prune.
        budget: How much.
        batches: Calibration data: keyword arguments of the model's forward pass.
        reconstruct: Steps of training for each block after its masks are set, on these batches.
        device: Where to compute. A model on another device (one on the CPU that is larger than the GPU) is brought
            there one block at a time, and activations wait on the CPU. Default: where the model is.
        cache: Where scores and finished blocks are kept.
        progress: Told about every block.

    Returns:
        The masks by layer name, on the CPU.

    Raises:
        PrunerError: If there is no data, a layer is reached by none of it, or a weight, an input or a score is not
            finite.
    """
    progress = progress or Progress()
    data = checked_batches(batches)
    with Walk(model, layers, data, device) as walk:
        key = _fingerprint(model, pruner, layers, data) if cache is not None else ""
        scores = _score(walk, pruner, cache, key, progress)
        masks = budget.masks(scores, layers)
        if pruner.compensates or reconstruct:
            _update(
                walk,
                pruner,
                masks,
                reconstruct,
                cache,
                _fingerprint_of_masks(key, masks, reconstruct),
                progress,
            )
            return masks
    for layer in layers:
        remove_blocks(layer, masks[layer.name])
    return masks


def remove_blocks(layer: PrunableLayer, mask: BlockMask) -> None:
    """Zeroes the blocks of the layer's weight that the mask removes."""
    layer.weight.masked_fill_(~mask.elements().to(layer.weight.device), 0)


def _score(
    walk: Walk, pruner: Pruner, cache: WalkCache | None, key: str, progress: Progress
) -> dict[str, Tensor]:
    """The first walk: scores of all layers, `(R, C)` on the CPU, by name."""
    scores: dict[str, Tensor] = {}
    by_name = {layer.name: layer for layer in walk.layers}
    for name in walk.names:
        stored = None if cache is None else cache.read(f"{key}/{name or 'model'}")
        for entry, tensor in (stored or {}).items():
            layer, _, statistic = entry.partition(":")
            if statistic:
                by_name[layer].statistics[statistic] = tensor
            else:
                scores[layer] = tensor
    if all(name in scores for name in by_name):
        return scores
    with progress.task("scoring blocks", len(walk.names)) as advance:
        for block in walk:
            if all(layer.name in scores for layer in block.layers):
                block.advance()
            else:
                block.advance(pruner)
                found = {}
                for layer in block.layers:
                    score = checked_score({layer.name: pruner.score(layer)}, layer)
                    found[layer.name] = score.float().cpu()
                scores |= found
                small = {
                    f"{layer.name}:{key}": value
                    for layer in block.layers
                    for key, value in _keep_small(layer)
                }
                if cache is not None:
                    cache.write(f"{key}/{block.name or 'model'}", found | small)
            advance(text=block.name)
    return scores


def _update(
    walk: Walk,
    pruner: Pruner,
    masks: Mapping[str, BlockMask],
    steps: int,
    cache: WalkCache | None,
    key: str,
    progress: Progress,
) -> None:
    """The second walk: adjusts and zeroes the weights of one block after the other."""
    with progress.task("adjusting weights", len(walk.names) * (1 + steps)) as advance:
        walk.compares = pruner.compares or steps > 0
        for block in walk:
            entry = f"{key}/{block.name or 'model'}"
            parameters = _parameters(block)
            done = cache.read(entry) if cache is not None else None
            if done is None:
                _adjust(block, pruner, masks)
                if steps and block.dense_calls:
                    advance(0, text=block.name)
                    progress.note(str(reconstruct_block(block, masks, steps, advance)))
                if cache is not None:
                    cache.write(
                        entry, {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
                    )
            for name, weight in (done or {}).items():
                parameters[name].copy_(weight)
            block.advance()
            advance(1 if done is None and block.dense_calls else 1 + steps, text=block.name)
    if cache is not None:
        cache.remove(key)


def _adjust(block: Block, pruner: Pruner, masks: Mapping[str, BlockMask]) -> None:
    """Lets the pruner adjust the layers of one block, and removes what their masks remove."""
    if not pruner.compensates:
        for layer in block.layers:
            remove_blocks(layer, masks[layer.name])
        return
    for group in block.groups():
        for layer in group:
            layer.statistics.clear()
        if needs_calibration(pruner):
            block.show(pruner, group)
        for layer in group:
            pruner.update_weights(layer, masks[layer.name])
            remove_blocks(layer, masks[layer.name])
            layer.statistics.clear()


def _parameters(block: Block) -> dict[str, nn.Parameter]:
    """What may change in a block, by name: all of it; in the role of a block, of the model only what is pruned."""
    if block.name:
        return dict(block.module.named_parameters())
    pruned = {id(layer.parameter) for layer in block.layers}
    return {name: p for name, p in block.module.named_parameters() if id(p) in pruned}


def _keep_small(layer: PrunableLayer) -> list[tuple[str, Tensor]]:
    """Drops a layer's statistics but for those that have one number a feature, which the budget may want to see."""
    kept = {name: value.cpu().clone() for name, value in layer.statistics.items() if value.dim() < 2}
    layer.statistics.clear()
    layer.statistics.update(kept)
    return list(kept.items())


def _fingerprint(
    model: nn.Module, pruner: Pruner, layers: Sequence[PrunableLayer], batches: Sequence[Batch]
) -> str:
    """What decides the scores, as a SHA-256: weights, pruner, options, layers, block shape and calibration data."""
    digest = hashlib.sha256()
    digest.update(repr((type(pruner).__module__, type(pruner).__qualname__, _options(pruner))).encode())
    digest.update(repr([(layer.name, layer.shape, str(layer.block)) for layer in layers]).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        _add(digest, tensor)
    for batch in batches:
        for name, value in batch.items():
            digest.update(name.encode())
            _add(digest, value) if isinstance(value, Tensor) else digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def _options(pruner: Pruner) -> list[tuple[str, str]]:
    """A pruner's attributes as text that is the same in every process."""
    return [
        (name, repr(sorted(value)) if isinstance(value, (set, frozenset)) else _ADDRESS.sub("", repr(value)))
        for name, value in sorted(vars(pruner).items())
    ]


def _fingerprint_of_masks(key: str, masks: Mapping[str, BlockMask], steps: int) -> str:
    digest = hashlib.sha256(str(steps).encode())
    for name, mask in masks.items():
        digest.update(name.encode())
        _add(digest, mask.keep)
    return f"{key}-{digest.hexdigest()[:16]}"


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
