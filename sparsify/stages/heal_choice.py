"""Which way of healing is faster here: training packed values, or dense weights under their mask.

A training step of every distinct layer shape is timed both ways, on a copy of one layer of that shape, and counted
as often as the shape occurs. Attention, norms and embeddings cost the same both ways and are left out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sparsify import masking
from sparsify.blocks import BlockMask
from sparsify.conv_weight import as_linear
from sparsify.layers.linear import BlockSparseLinear

# More tokens than this tell nothing new, and would make the measurement itself slow.
MOST_TOKENS = 2048
REPEATS = 5


def faster_form(
    model: nn.Module, masks: Mapping[str, BlockMask], tokens: int, dtype: torch.dtype
) -> tuple[str, str]:
    """Times both forms of the model's masked layers.

    Args:
        model: The model that will be trained; only its device is used.
        masks: Its masks by layer name.
        tokens: Tokens in one forward pass of the training.
        dtype: What the training multiplies in; the weights are float32.

    Returns:
        `"packed"` or `"masked"`, and the reason in words.
    """
    device = next(model.parameters()).device
    tokens = min(tokens, MOST_TOKENS)
    packed, masked = 0.0, 0.0
    shapes = Counter((mask.shape, mask.block) for mask in masks.values())
    for (shape, block), count in shapes.items():
        mask = next(mask for mask in masks.values() if (mask.shape, mask.block) == (shape, block))
        mask = as_linear(mask) if block.positions > 1 else mask  # a convolution's patches
        shape = mask.shape
        linear = nn.Linear(shape[1], shape[0], bias=False, device=device)
        sparse = BlockSparseLinear.from_linear(linear, mask)
        inputs = torch.randn(tokens, shape[1], device=device)
        wrapper = nn.ModuleDict({"layer": linear})
        masking.mask_model(wrapper, {"layer": mask}, dense_gradient=False)
        times = _step_seconds([sparse, linear], inputs, dtype)
        packed, masked = packed + count * times[0], masked + count * times[1]
    form = "packed" if packed <= masked else "masked"
    return (
        form,
        f"a step of the pruned layers takes {packed * 1e3:.1f} ms packed and {masked * 1e3:.1f} ms masked",
    )


def _step_seconds(layers: Sequence[nn.Module], inputs: torch.Tensor, dtype: torch.dtype) -> list[float]:
    """Shortest time of a forward and backward pass of each layer, taken in turns after one pass to warm up."""
    inputs = inputs.requires_grad_()
    times: list[list[float]] = [[] for _ in layers]
    for _ in range(REPEATS + 1):
        for layer, own in zip(layers, times, strict=True):
            start = time.perf_counter()
            with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
                outputs = layer(inputs)
            outputs.sum().backward()
            if inputs.device.type == "cuda":
                torch.cuda.synchronize(inputs.device)
            own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in times]
