"""Block-sparse models without weights: dense layers swapped for empty block-sparse ones on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sparsify.checkpoint.format import QUANT_METHOD, packed_weights
from sparsify.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from sparsify.checkpoint.conversions import KeyMap


def build(config: PreTrainedConfig, model_class: Any = None) -> PreTrainedModel:
    """Builds a block-sparse model from its config alone, on the meta device, without any weight file.

    `AutoModel.from_config` ignores `quantization_config` and builds the dense model; this builds the sparse one.
    Which blocks are stored is known only to the weight files, so masks and outputs are not available before loading.

    Args:
        config: A config with a block-sparse `quantization_config`.
        model_class: Class to build; by default the one that `config.architectures` names.

    Raises:
        CheckpointError: If the config is not block-sparse, or names an unknown class or layer.
    """
    import transformers

    from sparsify.checkpoint import parallel_loading
    from sparsify.checkpoint.quantizer import BlockSparseConfig, BlockSparseQuantizer

    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        raise CheckpointError("the config has no quantization_config: it describes a dense model")
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    if values.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"the config's quant_method is {values.get('quant_method')!r}, expected {QUANT_METHOD!r}"
        )
    if model_class is None:
        names = config.architectures or ["(none)"]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise CheckpointError(f"transformers has no model class {names[0]!r}: pass model_class")
    quantizer = BlockSparseQuantizer(BlockSparseConfig(**values), pre_quantized=True)
    with torch.device("meta"):
        model = model_class._from_config(config)
        quantizer.preprocess_model(model)
        parallel_loading.divide(model, quantizer.plan)  # of which nothing was asked: gives its plan back
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    return model


def swap_in(model: PreTrainedModel, layers: Mapping[str, dict[str, Any]]) -> None:
    """Replaces the dense layers that `layers` names by empty block-sparse ones.

    Args:
        model: Dense model on the meta device.
        layers: `quantization_config["layers"]`; names are those of the class that was saved. Where another class is
            loaded, as a bare encoder from a model with a head, layers that it lacks are passed over.

    Raises:
        CheckpointError: If the model lacks a layer, or a layer is of another kind or shape.
    """
    from sparsify.checkpoint.conversions import KeyMap
    from sparsify.layers.kinds import build as build_layer
    from sparsify.layers.swap import replace_module

    modules = dict(model.named_modules())
    same_class = type(model).__name__ in (model.config.architectures or [])
    key_map: KeyMap | None = None
    found = 0
    for name, entry in layers.items():
        target = name
        if target not in modules:
            key_map = key_map or KeyMap.of_model(model)
            suffix = f".{packed_weights(name, entry)[0].name}"
            target = key_map(name + suffix).removesuffix(suffix)
        if target not in modules:
            if same_class:
                raise CheckpointError(
                    f"config.json names the block-sparse layer {name!r}, which {type(model).__name__} does not have: "
                    f"config.json is damaged or belongs to other weights"
                )
            continue
        replace_module(model, target, build_layer(target, modules[target], entry))
        found += 1
    if layers and not found:
        raise CheckpointError(
            f"none of the checkpoint's {len(layers)} block-sparse layers (such as {next(iter(layers))!r}) exists in "
            f"{type(model).__name__}: load it with the class it was saved from, {model.config.architectures}"
        )
