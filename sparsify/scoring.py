"""Scores of all layers of a dense model, for a loop of one's own over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.allocation.budget import checked_score
from sparsify.calibration.statistics import checked_batches, needs_calibration
from sparsify.calibration.walk import Walk
from sparsify.pruner import PrunableLayer, Pruner


@torch.no_grad()
def score_layers(
    model: nn.Module,
    pruner: Pruner,
    layers: Sequence[PrunableLayer],
    batches: Iterable[Mapping[str, Any]] | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Scores every layer of the model as it is; no weight changes.

    Args:
        model: The dense model.
        pruner: Any pruner that works at once.
        layers: What to score. Of the statistics that calibration collects, each keeps those of one number a feature.
        batches: Calibration data, for a pruner that asks for it: keyword arguments of the model's forward pass.
        device: Where to compute; default: where the model is.

    Returns:
        For each layer its scores `(R, C)`, on the weight's device.

    Raises:
        PrunerError: If there is no data, a layer is reached by none of it, or a score is not finite.
    """
    scores: dict[str, Tensor] = {}
    if batches is None or not needs_calibration(pruner):
        scores = {layer.name: pruner.score(layer) for layer in layers}
        return [checked_score(scores, layer) for layer in layers]
    data = checked_batches(batches)
    with Walk(model, layers, data, device) as walk:
        for block in walk:
            block.advance(pruner)
            for layer in block.layers:
                scores[layer.name] = checked_score({layer.name: pruner.score(layer)}, layer)
            for layer in block.layers:  # those with the same input share their statistics
                small = {name: value for name, value in layer.statistics.items() if value.dim() < 2}
                layer.statistics.clear()
                layer.statistics.update(small)
    return [scores[layer.name].to(layer.parameter.device) for layer in layers]
