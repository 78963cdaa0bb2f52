"""The kinds of dense layer that have a block-sparse equivalent, and the way from one to the other and back.

    linear    nn.Linear and subclasses that do not override `forward`; weight `(N, K)`
    conv1d    transformers' Conv1D (GPT-2); weight `(K, N)`
    experts   transformers' fused mixture-of-experts weights, `(E, N, K)` or `(E, K, N)`
    convolution
              nn.Conv2d, nn.Conv1d and subclasses that do not override `forward`; weight `(O, I / groups, *kernel)`
    embedding nn.Embedding and `TiedEmbedding`; table `(N, K)`, rows by features
    lstm, gru, lstm_cell, gru_cell
              torch's recurrent layers; each weight `(N, K)` is a matrix of its own, the gates one after the other

To support another kind: a module in this folder and one branch in each function here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockMask, BlockShape
from sparsify.conv_weight import ConvWeight
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.layers.convolution import BlockSparseConv, BlockSparseConv1d, BlockSparseConv2d
from sparsify.layers.embedding import BlockSparseEmbedding, TiedEmbedding
from sparsify.layers.experts import BlockSparseExperts, projections
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.packed import PackedModule
from sparsify.layers.recurrent import CLASSES, SPARSE_CLASSES, BlockSparseRecurrent, recurrent_kind
from sparsify.pruner import PrunableLayer

COMPUTED = "its weight is computed anew in each call, by a parametrization or hook: remove that first"
QUANTIZED = "it is quantized: prune the model first, then quantize it"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_conv1d(module: nn.Module) -> bool:
    return any(
        cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D"
        for cls in type(module).mro()
    )


def _why_not_recurrent(module: nn.Module) -> str | None:
    kind = recurrent_kind(module)
    if kind is None:
        return f"{type(module).__name__} has no block-sparse equivalent; nn.LSTM and nn.GRU have one"
    if type(module).forward is not CLASSES[kind].forward:
        return f"{type(module).__name__} computes something other than nn.{CLASSES[kind].__name__}"
    suffixes = ("",) if kind.endswith("_cell") else ("_l0",)
    if any(
        f"weight_{part}{suffix}" not in module._parameters for part in ("ih", "hh") for suffix in suffixes
    ):
        return COMPUTED
    return None


_ConvNd = nn.modules.conv._ConvNd


def _why_not_convolution(module: _ConvNd) -> str | None:
    cls = type(module)
    if module.transposed:
        return f"{cls.__name__}: transposed convolutions have no block-sparse equivalent"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return f"{cls.__name__}: convolutions of one and two dimensions have a block-sparse equivalent"
    dense = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Conv1d
    if cls.forward is not dense.forward or cls._conv_forward is not dense._conv_forward:
        return f"{cls.__name__} computes something other than nn.{dense.__name__}"
    if isinstance(module._parameters.get("weight"), nn.UninitializedParameter):
        return "its shape is not known before the model has run once"
    if "weight" not in module._parameters:
        return COMPUTED
    if module.groups == module.in_channels > 1:
        return "a depthwise convolution has one input channel a group, and no block to leave out"
    return None


def _why_not_embedding(module: nn.Embedding) -> str | None:
    cls = type(module)
    if cls.forward not in (nn.Embedding.forward, TiedEmbedding.forward):
        return f"{cls.__name__} computes something other than nn.Embedding"
    options = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
    used = [name for name, unused in options.items() if getattr(module, name) != unused]
    if used:
        return f"an embedding with {used[0]} has no block-sparse equivalent"
    return None if "weight" in module._parameters else COMPUTED


def why_unsupported(module: nn.Module) -> str | None:
    """Why a module that holds a dense weight matrix cannot be swapped; `None` if it can, or holds none."""
    why = _why_not_class(module)
    return _why_not_values(module) if why is None and _kind(module) is not None else why


def _why_not_class(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "a torch.jit module is a compiled program: prune the Python module that it was made from"
    if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "from_float"):
        return QUANTIZED if hasattr(module, "_weight_bias") else None
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} computes something other than nn.Linear"
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads this weight without calling the layer"
        if isinstance(module._parameters.get("weight"), nn.UninitializedParameter):
            return "its shape is not known before the model has run once"
        if "weight" not in module._parameters:
            return COMPUTED
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _why_not_recurrent(module)
    if isinstance(module, _ConvNd):
        return _why_not_convolution(module)
    if isinstance(module, nn.Embedding):
        return _why_not_embedding(module)
    if projections(module) is not None and getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__name__} normalises inside each expert"
    return None


def _why_not_values(module: nn.Module) -> str | None:
    """What is wrong with the values of a module of a known kind."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter.dtype not in DTYPES:
            held = str(parameter.dtype).removeprefix("torch.")
            return f"its {name} is {held}: expected float16, bfloat16, float32 or float64"
        values = type(parameter.data)
        if values is not Tensor and not values.__module__.startswith("torch.distributed."):
            return f"its {name} is a {values.__name__}, no plain tensor; if that is quantized, prune the model first"
    return None


def dense_kind(module: nn.Module) -> str | None:
    """The kind of a dense module that can be swapped, one of those above, else `None`."""
    return None if why_unsupported(module) is not None else _kind(module)


def _kind(module: nn.Module) -> str | None:
    """The kind of a module by its class alone."""
    if isinstance(module, PackedModule):
        return None
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _ConvNd):
        return "convolution"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if _is_conv1d(module):
        return "conv1d"
    return "experts" if projections(module) is not None else recurrent_kind(module)


def is_sparse(module: nn.Module) -> bool:
    """Whether a module stores packed weights."""
    return isinstance(module, PackedModule)


def matrices(
    module_name: str, module: nn.Module, block: BlockShape, per_position: bool = False
) -> list[PrunableLayer]:
    """The weight matrices of a dense module: one, or one for each expert and projection, or each recurrent weight.

    Args:
        module_name: The module's name in its model.
        module: A module of some `dense_kind`; any other has none.
        block: Block shape to prune in.
        per_position: Whether each kernel position of a convolution is a matrix of its own.
    """
    kind, cls = dense_kind(module), type(module).__name__
    if kind is None:
        return []
    if isinstance(module, _ConvNd):
        weight, several = _conv_weight(module, per_position), module.groups > 1 or per_position
        return [
            PrunableLayer(
                name, module_name, module.get_parameter("weight"), weight.block(block), index if several else None,
                module_class=cls, conv=weight,
            )
            for index, name in enumerate(weight.names(module_name))
        ]  # fmt: skip
    if kind in SPARSE_CLASSES:
        return [
            PrunableLayer(f"{module_name}.{name}", module_name, parameter, block, module_class=cls)
            for name, parameter in module.named_parameters(recurse=False)
            if name.startswith("weight_")
        ]
    if kind != "experts":
        assert isinstance(module.weight, nn.Parameter)
        transposed = kind == "conv1d"
        return [PrunableLayer(module_name, module_name, module.weight, block, None, transposed, cls)]
    transposed = bool(getattr(module, "is_transposed", False))
    layers = []
    for name in projections(module) or ():
        parameter = module.get_parameter(name)
        layers += [
            PrunableLayer(
                f"{module_name}.{name}.{expert}", module_name, parameter, block, expert, transposed, cls
            )
            for expert in range(parameter.shape[0])
        ]
    return layers


def every_matrix(module_name: str, module: nn.Module) -> list[PrunableLayer]:
    """The weight matrices of a dense module by every name they can have, to look masks up by them; see `matrices`."""
    smallest = BlockShape(8, 8)
    found = matrices(module_name, module, smallest)
    return found + (matrices(module_name, module, smallest, True) if isinstance(module, _ConvNd) else [])


def _conv_weight(module: _ConvNd, per_position: bool) -> ConvWeight:
    return ConvWeight(
        module.out_channels, module.in_channels, tuple(module.kernel_size), module.groups, per_position
    )


def _sparse_conv(module: _ConvNd) -> type[BlockSparseConv]:
    return BlockSparseConv2d if isinstance(module, nn.Conv2d) else BlockSparseConv1d


def to_sparse(module_name: str, module: nn.Module, masks: dict[str, BlockMask]) -> PackedModule:
    """The block-sparse equivalent of a dense module.

    Args:
        module_name: The module's name in its model.
        module: A module of some `dense_kind`.
        masks: Mask of each matrix by `PrunableLayer.name`. An experts module or a convolution whose matrices are only
            partly named keeps all blocks of the others; a recurrent module keeps the others dense.

    Raises:
        SparsifyError: If the module is of no kind, has no mask, or its weights are not in memory.
    """
    kind = dense_kind(module)
    given = next((mask for name, mask in masks.items() if name.startswith(module_name)), None)
    if kind is None or given is None:
        raise SparsifyError(
            f"{module_name} ({type(module).__name__}) has no block-sparse equivalent or no mask"
        )
    if any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
        raise SparsifyError(
            f"the weights of {module_name} are offloaded: load the model without offloading first"
        )
    if isinstance(module, _ConvNd):
        per_position = not masks.keys() <= set(_conv_weight(module, False).names(module_name))
        weight = _conv_weight(module, per_position)
        full = BlockMask.full(weight.shape, weight.block(given.block))
        own = [masks.get(name, full) for name in weight.names(module_name)]
        return _sparse_conv(module).from_conv(module, own, per_position=per_position)
    if kind == "experts":
        sparse = BlockSparseExperts(module)
        layers = matrices(module_name, module, given.block)
        for name in projections(module) or ():
            own = [layer for layer in layers if layer.parameter is module.get_parameter(name)]
            full = BlockMask.full(own[0].shape, given.block)
            sparse.pack_weight(
                name, module.get_parameter(name), [masks.get(layer.name, full) for layer in own]
            )
        return sparse
    if kind in SPARSE_CLASSES:
        start = len(module_name) + 1
        return SPARSE_CLASSES[kind](module, {name[start:]: mask for name, mask in masks.items()})
    if isinstance(module, nn.Embedding):
        return BlockSparseEmbedding.from_embedding(module, masks[module_name])
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    if kind == "linear":
        return BlockSparseLinear.from_dense(weight, bias, masks[module_name]).train(module.training)
    sparse = BlockSparseLinear.from_dense(weight.detach().t(), bias, masks[module_name]).train(
        module.training
    )
    sparse.weight.requires_grad_(weight.requires_grad)
    sparse.transposed = True
    return sparse


def dense_parameters(module: PackedModule) -> dict[str, Tensor]:
    """The packed weights as the dense module kept them, with zeros; detached copies by parameter name.

    Returns:
        `weight` `(N, K)` for a linear layer or an embedding, `(K, N)` for a Conv1D, `(O, I / groups, *kernel)` for a
        convolution; each fused weight for experts; each packed weight of a recurrent module.
    """
    if isinstance(module, BlockSparseConv):
        return {"weight": module.dense_weight()}
    if isinstance(module, BlockSparseRecurrent):
        return {name: module.dense_of(name) for name in module.packed}
    if isinstance(module, BlockSparseExperts):
        return {name: module.dense_parameter(name) for name in module.packed}
    if isinstance(module, BlockSparseEmbedding):
        return {"weight": module.dense_weight()}
    assert isinstance(module, BlockSparseLinear)
    dense = module.dense_weight()
    return {"weight": dense.t().contiguous() if module.transposed else dense}


def entry(module: PackedModule) -> dict[str, Any]:
    """What `config.json` records of a block-sparse module; with it `build` needs no weight file."""
    if isinstance(module, BlockSparseExperts):
        weights = {
            name: {"shape": [p.count, *p.shape]} | _entry(p.block, p.blocks)
            for name, p in module.packed.items()
        }
        return {"kind": "experts", "weights": weights}
    if isinstance(module, BlockSparseRecurrent):
        weights = {
            name: {"shape": list(p.shape)} | _entry(p.block, p.blocks) for name, p in module.packed.items()
        }
        return {"kind": module.kind, "weights": weights}
    if isinstance(module, BlockSparseConv):
        sizes = {"shape": list(module.layout.full_shape), "groups": module.groups}
        sizes |= {"per_position": True} if module.layout.per_position else {}
        return {"kind": "convolution"} | sizes | _entry(module.block_shape, len(module.weight))
    packed, kind = module.packed["weight"], "embedding"
    if isinstance(module, BlockSparseLinear):
        kind = "conv1d" if module.transposed else "linear"
    return {"kind": kind, "shape": list(packed.shape)} | _entry(packed.block, packed.blocks)


def _entry(block: BlockShape, blocks: int) -> dict[str, Any]:
    return {"block_shape": [block.rows, block.cols], "blocks": blocks}


def build(module_name: str, module: nn.Module, entry: dict[str, Any]) -> PackedModule:
    """The block-sparse module, on the meta device, that an `entry` of `config.json` describes.

    Args:
        module_name: The module's name in its model, for the error message.
        module: The dense module it takes the place of, usually on the meta device.
        entry: What `entry` wrote.

    Raises:
        CheckpointError: If the entry does not describe this module.
    """
    kind = dense_kind(module)
    try:
        if kind != entry["kind"]:
            raise ValueError(f"it is a {entry['kind']} layer there, the model has {type(module).__name__}")
        if isinstance(module, _ConvNd):
            return _build_convolution(module, entry)
        found = matrices(module_name, module, BlockShape(8, 8))
        if kind in SPARSE_CLASSES:
            return _build_recurrent(module_name, module, kind, entry, found)
        if kind != "experts":
            shape, block, blocks = _read(entry, found[0].shape)
            dtype = found[0].parameter.dtype
            if isinstance(module, nn.Embedding):
                table = BlockSparseEmbedding(
                    *shape, block, None, module.padding_idx, "meta", dtype, blocks=blocks
                )
                return table.train(module.training)
            bias = module._parameters.get("bias") is not None
            sparse = BlockSparseLinear(shape[1], shape[0], block, None, bias, "meta", dtype, blocks=blocks)
            sparse.transposed = kind == "conv1d"
            return sparse.train(module.training)
        sparse = BlockSparseExperts(module)
        for name in projections(module) or ():
            parameter = module.get_parameter(name)
            own = next(layer for layer in found if layer.parameter is parameter)
            shape, block, blocks = _read(entry["weights"][name], own.shape, parameter.shape[0])
            sparse.add_weight(name, shape, block, blocks, parameter.dtype)
        return sparse
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"quantization_config of layer {module_name!r} does not fit the model: {error}"
        ) from error


def _build_convolution(module: _ConvNd, entry: dict[str, Any]) -> BlockSparseConv:
    weight = _conv_weight(module, bool(entry.get("per_position")))
    described = list(entry["shape"]), entry["groups"]
    if described != (list(weight.full_shape), weight.groups):
        raise ValueError(
            f"its shape is {described[0]} in {described[1]} groups there, the model has {list(weight.full_shape)} in "
            f"{weight.groups}"
        )
    block, blocks = BlockShape.parse(entry["block_shape"]), entry["blocks"]
    rows, cols = weight.grid(block)
    if not isinstance(blocks, int) or not 0 <= blocks <= rows * cols:
        raise ValueError(f"it has {blocks} blocks, expected 0 to {rows * cols}")
    sparse = _sparse_conv(module).like(
        module,
        block,
        per_position=weight.per_position,
        device="meta",
        dtype=module.weight.dtype,
        blocks=blocks,
    )
    return sparse.train(module.training)


def _build_recurrent(
    module_name: str, module: nn.Module, kind: str, entry: dict[str, Any], found: list[PrunableLayer]
) -> PackedModule:
    sparse = SPARSE_CLASSES[kind](module)
    by_name = {layer.name: layer for layer in found}
    for name, described in entry["weights"].items():
        layer = by_name[f"{module_name}.{name}"]
        shape, block, blocks = _read(described, layer.shape)
        sparse.add_weight(name, shape, block, blocks, layer.parameter.dtype)
    return sparse


def _read(
    entry: dict[str, Any], shape: tuple[int, int], count: int | None = None
) -> tuple[tuple[int, int], BlockShape, int]:
    recorded = list(shape) if count is None else [count, *shape]
    if list(entry["shape"]) != recorded:
        raise ValueError(f"its shape is {entry['shape']} there, the model has {recorded}")
    block, blocks = BlockShape.parse(entry["block_shape"]), entry["blocks"]
    rows, cols = block.grid(shape)
    if not isinstance(blocks, int) or not 0 <= blocks <= (count or 1) * rows * cols:
        raise ValueError(f"it has {blocks} blocks, expected 0 to {(count or 1) * rows * cols}")
    return shape, block, blocks
