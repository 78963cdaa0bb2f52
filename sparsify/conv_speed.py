"""Which convolutions are better left dense on a GPU: both forms of each distinct one, timed on the spot.

Unlike a linear layer's, their times are not looked up: they depend on kernel, stride and image, and cuDNN has an
algorithm for each. A race takes a fraction of a second. What the images of a model are is not known here, so they are
taken to be 64 of 14 x 14 output pixels, a usual size in the middle of a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from sparsify.bench.timing import race
from sparsify.blocks import BlockMask
from sparsify.layers.convolution import BlockSparseConv
from sparsify.layers.kinds import dense_kind, every_matrix, to_sparse

BATCH, SIDE = 64, 14
ROUNDS = 10


def slower_convolutions(
    model: nn.Module, masks: Mapping[str, BlockMask], device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """The pruned matrices of convolutions that would run slower block-sparse than dense.

    Args:
        model: The model, still dense; its convolutions are not changed.
        masks: Masks by the name of the matrix.
        device: A GPU.
        dtype: What the model computes in.

    Returns:
        Why, by the name of the matrix.
    """
    known: dict[str, float] = {}
    slower: dict[str, str] = {}
    for name, module in model.named_modules():
        if dense_kind(module) != "convolution":
            continue
        own = {layer.name: masks[layer.name] for layer in every_matrix(name, module) if layer.name in masks}
        if not any(mask.blocks_kept for mask in own.values()):
            continue  # what has nothing left costs nothing
        sparse = to_sparse(name, module, own)
        assert isinstance(sparse, BlockSparseConv)
        key = repr(sparse)  # sizes, block shape and density
        if key not in known:
            known[key] = speedup(module, sparse, device, dtype)
        if known[key] < 1:
            slower |= dict.fromkeys(own, f"measured {known[key]:.2f}x the speed of dense here")
    return slower


def speedup(dense: nn.Module, sparse: BlockSparseConv, device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a block-sparse convolution over the dense one, forward, on channels-last images.

    Args:
        dense: The dense layer; its weights do not matter.
        sparse: The block-sparse one.
        device: Where to time them.
        dtype: Of weights and activations.
    """
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    dense, sparse = deepcopy(dense).to(**place), deepcopy(sparse).to(**place)
    weight = dense.get_parameter("weight")
    with torch.no_grad():
        nn.init.normal_(weight)  # zeros would draw less power, and flatter the dense layer
    if sparse.dimensions == 2:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    windows = zip(sparse.kernel_size, sparse.stride, sparse.dilation, strict=True)
    sizes = [max(stride * SIDE, dilation * (kernel - 1) + 1) for kernel, stride, dilation in windows]
    x = torch.randn(BATCH, *sizes, sparse.in_channels, **place).movedim(-1, 1)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        seconds = race({"dense": lambda: dense(x), "sparse": lambda: sparse(x)}, device, ROUNDS).seconds
    finally:
        torch.backends.cudnn.benchmark = before
    return seconds["dense"] / seconds["sparse"]
