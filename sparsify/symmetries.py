"""The free symmetries of a network: units that can change places without changing what it computes.

    hidden units of a feed-forward network    rows of gate and up, columns of down
    value dimensions of an attention head     rows of its value projection, columns of the output projection, for all
                                              query heads that share the value head (grouped-query attention)
    hidden units of an expert                 the same as those of a feed-forward network, for each expert
    channels inside a residual block          output channels of a convolution or linear layer, of the batch norms and
                                              depthwise convolutions behind it, input channels of the next one

A symmetry is found by the names under which transformers' modules keep their layers (of residual blocks also those of
timm and torchvision), and left alone wherever
something that belongs to the units is not accounted for: another parameter inside the module, a norm of the values,
widths that do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockShape
from sparsify.layers.kinds import dense_kind, matrices

# Layers that make units and the layer that reads them, by their names in the module that holds them.
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("lin1",), "lin2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("up_proj",), "down_proj"),
)
VALUES = (
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("v", "o"),
    ("v_lin", "out_lin"),
    ("self.value", "output.dense"),
    ("attention.value", "output.dense"),
)
# Residual blocks by library and class: their modules, in the order in which they run.
RESIDUAL_BLOCKS = {
    ("transformers", "ResNetBasicLayer"): ("layer",),
    ("transformers", "ResNetBottleNeckLayer"): ("layer",),
    ("transformers", "MobileNetV2InvertedResidual"): ("expand_1x1", "conv_3x3", "reduce_1x1"),
    ("transformers", "ConvNextLayer"): ("pwconv1", "act", "pwconv2"),
    ("timm", "BasicBlock"): ("conv1", "bn1", "drop_block", "act1", "aa", "conv2"),
    ("timm", "Bottleneck"): ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3"),
    ("timm", "InvertedResidual"): ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl"),
    ("torchvision", "BasicBlock"): ("conv1", "bn1", "relu", "conv2"),
    ("torchvision", "Bottleneck"): ("conv1", "bn1", "relu", "conv2", "bn2", "conv3"),
    ("torchvision", "InvertedResidual"): ("conv",),
}
# Modules that treat all channels alike, if they have no parameters.
ALIKE = (
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "torch.nn.modules.pooling",
    "transformers.activations",
)
# What attention modules call the size of a head.
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True, eq=False)
class Axis:
    """Where the units lie in one weight or bias.

    Attributes:
        name: Name of the layer, for the record.
        tensor: `(N, K)` view of the weight, `(O, I, P)` of a convolution's with `P` kernel positions, or `(N,)` of the
            bias or another vector; writing to it writes to the parameter.
        dim: 0 if units are output features, 1 if they are input features.
        positions: `(units,)` feature of each unit, int64.
    """

    name: str
    tensor: Tensor
    dim: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Symmetry:
    """Units that can change places, and everywhere they show.

    Attributes:
        name: Name of the module that has them, with the head or expert where there are several.
        units: How many.
        axes: Weights and biases that they show in.
    """

    name: str
    units: int
    axes: tuple[Axis, ...]

    @torch.no_grad()
    def apply(self, order: Tensor) -> None:
        """Puts unit `order[i]` in the place of unit `i`, in every weight and bias.

        Args:
            order: `(units,)` a permutation, int64.

        Raises:
            ValueError: If `order` is no permutation of the units.
        """
        order = order.cpu()
        if not torch.equal(order.sort().values, torch.arange(self.units)):
            raise ValueError(f"{self.name}: expected a permutation of {self.units} units")
        for axis in self.axes:
            place = axis.positions.to(axis.tensor.device)
            moved = axis.tensor.index_select(axis.dim, place[order.to(place.device)])
            axis.tensor.index_copy_(axis.dim, place, moved)


def symmetries(model: nn.Module) -> list[Symmetry]:
    """All free symmetries of a dense model that are known, in the model's order.

    Args:
        model: Dense; block-sparse layers have none that are free.
    """
    found: list[Symmetry] = []
    taken: set[tuple[int, int, int]] = set()  # modules may be shared, and one may hold another's layers
    for name, module in model.named_modules():
        for symmetry in _of(name, module):
            places = {(axis.tensor.data_ptr(), axis.dim, int(axis.positions[0])) for axis in symmetry.axes}
            if not places & taken:
                taken |= places
                found.append(symmetry)
    return found


def _of(name: str, module: nn.Module) -> Iterator[Symmetry]:
    if dense_kind(module) == "experts":
        yield from _experts(name, module)
        return
    block = RESIDUAL_BLOCKS.get((type(module).__module__.partition(".")[0], type(module).__name__))
    if block is not None:
        yield from _channels(name, module, block)
        return
    for makers, reader in FEED_FORWARD:
        layers = [_layer(module, own) for own in (*makers, reader)]
        if all(layers) and _alone(module, [*makers, reader]):
            yield from _feed_forward(name, module, makers, reader)
            return
    for value, reader in VALUES:
        if _layer(module, value) and _layer(module, reader):
            yield from _values(name, module, value, reader)
            return


def _layer(module: nn.Module, name: str) -> nn.Module | None:
    """The linear layer of this name, if it is one."""
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return None
    return layer if dense_kind(layer) in ("linear", "conv1d") else None


def _alone(module: nn.Module, names: list[str]) -> bool:
    """Whether nothing between the layers has parameters; norms after the last one belong to other units."""
    inside = {name.rpartition(".")[0] for name in names} - {""}
    roots = [module.get_submodule(name) for name in inside] or [module]
    known = {id(parameter) for name in names for parameter in module.get_submodule(name).parameters()}
    for root in roots:
        for own, parameter in root.named_parameters():
            if id(parameter) not in known and not (inside and "norm" in own.lower()):
                return False
    return True


def _axes(name: str, module: nn.Module, layer: str, dim: int, positions: Tensor) -> Iterator[Axis]:
    owner, full = module.get_submodule(layer), f"{name}.{layer}".strip(".")
    yield Axis(full, matrices(full, owner, BlockShape(8, 8))[0].weight, dim, positions)
    bias = owner._parameters.get("bias")
    if dim == 0 and bias is not None:
        yield Axis(f"{full}.bias", bias.detach(), 0, positions)


def _shape(module: nn.Module, layer: str) -> tuple[int, int]:
    return matrices(layer, module.get_submodule(layer), BlockShape(8, 8))[0].shape


def _feed_forward(name: str, module: nn.Module, makers: tuple[str, ...], reader: str) -> Iterator[Symmetry]:
    units = _shape(module, reader)[1]
    if any(_shape(module, maker)[0] != units for maker in makers):
        return
    places = torch.arange(units)
    axes = [axis for maker in makers for axis in _axes(name, module, maker, 0, places)]
    yield Symmetry(name, units, (*axes, *_axes(name, module, reader, 1, places)))


def _values(name: str, module: nn.Module, value: str, reader: str) -> Iterator[Symmetry]:
    holders = [module, *(child for child in module.children())]
    sizes = {getattr(holder, key) for holder in holders for key in HEAD_SIZES if hasattr(holder, key)}
    features, read = _shape(module, value)[0], _shape(module, reader)[1]
    if len(sizes) != 1 or any("v_norm" in own or "value_norm" in own for own, _ in module.named_modules()):
        return
    (size,) = sizes
    if not isinstance(size, int) or features % size or read % features:
        return
    shared = read // features  # query heads of one value head
    for head in range(features // size):
        inside = torch.arange(size)
        axes = list(_axes(name, module, value, 0, head * size + inside))
        for query in range(head * shared, (head + 1) * shared):
            axes += _axes(name, module, reader, 1, query * size + inside)
        yield Symmetry(f"{name}, value head {head}", size, tuple(axes))


def _experts(name: str, module: nn.Module) -> Iterator[Symmetry]:
    layers = {layer.name: layer for layer in matrices(name, module, BlockShape(8, 8))}
    # Interleaved halves and biases belong to layouts of their own.
    if getattr(module, "is_concatenated", True) is False or any("bias" in own for own in module._parameters):
        return
    expert = 0
    while (down := layers.get(f"{name}.down_proj.{expert}")) is not None:
        units, places = down.shape[1], torch.arange(down.shape[1])
        gated = layers.get(f"{name}.gate_up_proj.{expert}")
        up = layers.get(f"{name}.up_proj.{expert}")
        axes = []
        if gated is not None and gated.shape[0] == 2 * units:
            axes = [
                Axis(gated.name, gated.weight, 0, places),
                Axis(gated.name, gated.weight, 0, units + places),
            ]
        elif up is not None and up.shape[0] == units:
            axes = [Axis(up.name, up.weight, 0, places)]
        if axes:
            yield Symmetry(
                f"{name}, expert {expert}", units, (*axes, Axis(down.name, down.weight, 1, places))
            )
        expert += 1


def _channels(name: str, module: nn.Module, names: tuple[str, ...]) -> Iterator[Symmetry]:
    """The channels between each two convolutions of a residual block, where all that tells them apart is known."""
    maker, units, axes = "", 0, list[Axis]()
    for own, part in (
        found for child in names for found in _in_order(f"{name}.{child}".strip("."), module, child)
    ):
        places = torch.arange(units)
        if dense_kind(part) in ("convolution", "linear") and getattr(part, "groups", 1) == 1:
            weight = _positions(part.get_parameter("weight"))
            if weight.shape[1] == units:
                yield Symmetry(f"{maker}, output channels", units, (*axes, Axis(own, weight, 1, places)))
            maker, units, places = own, len(weight), torch.arange(len(weight))
            axes = [Axis(own, weight, 0, places), *_vectors(own, places, bias=part._parameters["bias"])]
        elif isinstance(part, nn.modules.batchnorm._BatchNorm) and part.num_features == units:
            axes += _vectors(own, places, **dict(part.named_parameters(recurse=False)))
            axes += _vectors(own, places, mean=part.running_mean, variance=part.running_var)
        elif _is_depthwise(part, units):
            columns = part.get_parameter("weight").flatten(1).unbind(1)
            axes += _vectors(own, places, **{f"position.{i}": column for i, column in enumerate(columns)})
            axes += _vectors(own, places, bias=part._parameters["bias"])
        elif not _treats_alike(part):
            units, axes = 0, []


def _in_order(name: str, module: nn.Module, child: str) -> Iterator[tuple[str, nn.Module]]:
    """A child of a residual block, or what runs in it, one after the other."""
    part = module._modules.get(child)
    known = (nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    if part is None:
        return
    if isinstance(part, known) or not any(isinstance(inner, known) for inner in part.modules()):
        yield name, part
    elif isinstance(part, nn.Sequential) or type(part).__name__ in (
        "ResNetConvLayer",
        "MobileNetV2ConvLayer",
    ):
        for inner in part._modules:
            yield from _in_order(f"{name}.{inner}", part, inner)
    else:
        yield name, part


def _positions(weight: Tensor) -> Tensor:
    """The weight of a convolution as `(O, I, P)`, of a linear layer as it is."""
    return weight.detach() if weight.dim() == 2 else weight.detach().flatten(2)


def _vectors(name: str, places: Tensor, **tensors: Tensor | None) -> list[Axis]:
    return [
        Axis(f"{name}.{key}", tensor.detach(), 0, places)
        for key, tensor in tensors.items()
        if tensor is not None
    ]


def _is_depthwise(module: nn.Module, channels: int) -> bool:
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    return "weight" in module._parameters and {module.groups, module.in_channels, module.out_channels} == {
        channels
    }


def _treats_alike(module: nn.Module) -> bool:
    if any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    return isinstance(module, nn.Identity) or type(module).__module__ in ALIKE
