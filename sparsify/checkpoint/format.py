"""What a block-sparse checkpoint consists of: names, versions, and the per-layer entries of its `config.json`.

`docs/checkpoint-format.md` is the specification that this file and `quantizer.py` implement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsify.blocks import BlockShape
from sparsify.conv_weight import ConvWeight
from sparsify.errors import BlockShapeError, CheckpointError
from sparsify.layers.packed import PackedModule, PackedWeight

QUANT_METHOD = "block_sparse"
FORMAT_VERSION = 1
# Kinds whose weights are matrices of their own, each packed or dense.
RECURRENT = ("lstm", "gru", "lstm_cell", "gru_cell")
RECIPE_FILE = "sparsify_recipe.yaml"
REPORT_FILE = "sparsify_report.json"
REPORT_PAGE = "sparsify_report.html"
# Key of `quantization_config` under which stands, by name, why a pruned layer is dense all the same.
KEPT_DENSE = "kept_dense"


def check_format(version: object, layers: object) -> dict[str, Any]:
    """Checks the `format_version` and the `layers` of a `quantization_config`.

    Returns:
        The layers.

    Raises:
        CheckpointError: If the version is unknown, or an entry is malformed.
    """
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has block-sparse format version {version!r}, this version of sparsify reads "
            f"{FORMAT_VERSION}: upgrade block-sparsify"
        )
    if not isinstance(layers, Mapping):
        raise CheckpointError("config.json: quantization_config has no `layers`: the checkpoint is damaged")
    for name, entry in layers.items():
        packed_weights(name, entry)
    return dict(layers)


def packed_weights(layer: str, entry: object) -> list[PackedWeight]:
    """Reads and checks the entry of one layer in `quantization_config["layers"]`.

    Args:
        layer: The layer's name, for messages.
        entry: Its entry.

    Returns:
        Description of each packed parameter of the layer.

    Raises:
        CheckpointError: If the entry is not of the form that `docs/checkpoint-format.md` describes.
    """
    if not isinstance(entry, Mapping):
        raise _bad(layer, f"expected a mapping, got {entry!r}")
    kind = entry.get("kind")
    if kind in ("linear", "conv1d", "embedding"):
        return [_packed_weight(layer, "weight", entry, 2)]
    if kind == "convolution":
        return [_packed_convolution(layer, entry)]
    if kind == "experts" or kind in RECURRENT:
        weights = entry.get("weights")
        if not isinstance(weights, Mapping) or not weights:
            raise _bad(layer, f"kind {kind} needs `weights`, a mapping of parameter names")
        rank = 3 if kind == "experts" else 2
        return [_packed_weight(layer, str(name), weight, rank) for name, weight in weights.items()]
    known = ", ".join(("linear", "conv1d", "embedding", "experts", "convolution", *RECURRENT))
    raise _bad(layer, f"unknown kind {kind!r}, this version knows {known}")


def packed_names(module: PackedModule) -> list[str]:
    """State-dict names of a block-sparse module's packed parameters and their index buffers."""
    names = []
    for packed in module.packed.values():
        names += [packed.name, f"{packed.prefix}crow_indices", f"{packed.prefix}col_indices"]
    return names


def _packed_weight(layer: str, name: str, entry: object, rank: int) -> PackedWeight:
    if not isinstance(entry, Mapping):
        raise _bad(layer, f"{name}: expected a mapping, got {entry!r}")
    shape = _integers(layer, entry, "shape", rank)
    try:
        block = BlockShape(*_integers(layer, entry, "block_shape", 2))
    except BlockShapeError as error:
        raise _bad(layer, f"{name}: {error}") from error
    count = shape[0] if rank == 3 else 1
    rows, cols = block.grid((shape[-2], shape[-1]))
    blocks = entry.get("blocks")
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 0 <= blocks <= count * rows * cols:
        raise _bad(
            layer, f"{name}: `blocks` must be an integer from 0 to {count * rows * cols}, got {blocks!r}"
        )
    prefix = "" if name == "weight" else f"{name}_"
    return PackedWeight(name, prefix, count, (shape[-2], shape[-1]), block, blocks)


def _packed_convolution(layer: str, entry: Mapping[str, Any]) -> PackedWeight:
    shape = entry.get("shape")
    rank = len(shape) if isinstance(shape, (list, tuple)) and len(shape) in (3, 4) else 4
    outputs, inputs, *kernel = _integers(layer, entry, "shape", rank)
    groups, per_position = entry.get("groups"), entry.get("per_position", False)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or outputs % groups:
        raise _bad(layer, f"`groups` must be a positive integer that divides {outputs}, got {groups!r}")
    if not isinstance(per_position, bool):
        raise _bad(layer, f"`per_position` must be true or false, got {per_position!r}")
    try:
        block = BlockShape(*_integers(layer, entry, "block_shape", 2))
    except BlockShapeError as error:
        raise _bad(layer, str(error)) from error
    conv = ConvWeight(outputs, inputs * groups, tuple(kernel), groups, per_position)
    blocks, (rows, cols) = entry.get("blocks"), conv.grid(block)
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 0 <= blocks <= rows * cols:
        raise _bad(layer, f"`blocks` must be an integer from 0 to {rows * cols}, got {blocks!r}")
    return PackedWeight.of_conv(conv, block, blocks)


def _integers(layer: str, entry: Mapping[str, Any], key: str, length: int) -> tuple[int, ...]:
    value = entry.get(key)
    if (
        not isinstance(value, (list, tuple))
        or len(value) != length
        or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in value)
    ):
        raise _bad(layer, f"`{key}` must be a list of {length} positive integers, got {value!r}")
    return tuple(value)


def _bad(layer: str, fault: str) -> CheckpointError:
    return CheckpointError(f"config.json, quantization_config, layer {layer!r}: {fault}")
