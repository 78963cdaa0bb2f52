"""Several processes: one mask for all of them, and sharded weights (FSDP2) shown whole to a pruner.

A pruner computes with plain tensors. While `gathered` is open, each layer's parameter is a whole copy of the sharded
one, the same on every process; so every process comes to the same scores and masks, bit for bit, and to those that a
single process would come to with the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from sparsify.blocks import BlockMask
from sparsify.errors import ConfigError
from sparsify.layers.kinds import every_matrix
from sparsify.pruner import PrunableLayer


def rebind(layers: Sequence[PrunableLayer], model: nn.Module) -> None:
    """Points layers at the parameters that the model has now: sharding a model replaces them.

    Raises:
        ConfigError: If the model has no dense weight of a layer's name and shape.
    """
    found: dict[str, PrunableLayer] = {}
    for name, module in model.named_modules():
        found.update((layer.name, layer) for layer in every_matrix(name, module))
    for layer in layers:
        new = found.get(layer.name)
        if new is None or new.shape != layer.shape:
            raise ConfigError(
                f"layer {layer.name} is no dense weight of the model that is trained: select the layers of that model"
            )
        layer.parameter = new.parameter


@contextmanager
def gathered(layers: Sequence[PrunableLayer], *, write: bool = False) -> Iterator[None]:
    """While it is open, the layers' parameters and their gradients are whole; every process must open it.

    Args:
        layers: The layers; those that are not sharded stay as they are.
        write: Take what was written to the weights over into the shards at the end.
    """
    sharded = {id(layer.parameter): layer.parameter for layer in layers if is_sharded(layer.parameter)}
    whole = {key: _whole(parameter) for key, parameter in sharded.items()}
    moved = [(layer, layer.parameter) for layer in layers if id(layer.parameter) in whole]
    for layer, parameter in moved:
        layer.parameter = whole[id(parameter)]
    try:
        yield
        if write:
            with torch.no_grad():
                for key, parameter in sharded.items():
                    _scatter(whole[key].detach(), parameter)
    finally:
        for layer, parameter in moved:
            layer.parameter = parameter


def agreed(masks: Mapping[str, BlockMask], layers: Sequence[PrunableLayer]) -> dict[str, BlockMask]:
    """The masks of the first process, on all of them; every process must ask, with masks of the same layers.

    All come to the same masks by themselves as long as their hardware rounds alike; this makes sure of it.
    """
    if not _several():
        return dict(masks)
    names = sorted(masks)
    together = torch.cat([masks[name].keep.flatten() for name in names]).to(torch.uint8)
    device = layers[0].parameter.device
    together = together.to(device)
    distributed.broadcast(together, 0)
    parts = together.bool().cpu().split([masks[name].keep.numel() for name in names])
    return {
        name: BlockMask(part.view(masks[name].keep.shape).clone(), masks[name].shape, masks[name].block)
        for name, part in zip(names, parts, strict=True)
    }


def share_statistics(layers: Sequence[PrunableLayer]) -> None:
    """Gives all processes the statistics of the first one, which may have seen other batches."""
    if not _several():
        return
    for layer in layers:
        found = [{key: tensor.cpu() for key, tensor in layer.statistics.items()}]
        distributed.broadcast_object_list(found, 0)
        device = layer.parameter.device
        layer.statistics.update({key: t.to(device) if t.dim() else t for key, t in found[0].items()})


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter is one process's part of a sharded one."""
    return hasattr(tensor, "device_mesh")


def freeze_empty(model: nn.Module) -> None:
    """Asks for no gradient of weights of which no block is stored: FSDP2 cannot reduce one without elements.

    Call it before `fully_shard` where a packed layer may be empty.
    """
    for parameter in model.parameters():
        if parameter.numel() == 0:
            parameter.requires_grad_(False)


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    def full(tensor: Tensor) -> Tensor:
        return tensor.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]

    copy = nn.Parameter(full(parameter).clone(), requires_grad=parameter.requires_grad)
    copy.grad = None if parameter.grad is None else full(parameter.grad)
    return copy


def _scatter(whole: Tensor, parameter: nn.Parameter) -> None:
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore[reportAttributeAccessIssue]
    parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))


def spare(model: nn.Module) -> nn.Module:
    """The same model without its weights, to `fill` once the model itself has been trained in shards.

    Sharding changes a model for good; there is no way back but into a new one. Buffers are copied.
    """
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


@torch.no_grad()
def fill(whole: nn.Module, sharded: nn.Module, device: torch.device) -> None:
    """Gives `whole` the weights of `sharded`, in its own dtypes; every process must call it.

    Args:
        whole: What `spare` made of the model before it was sharded.
        sharded: The model, not masked any more.
        device: Where the weights go.
    """
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in whole.named_parameters():
        source = sharded.get_parameter(name).detach()
        full = source.full_tensor() if is_sharded(source) else source  # pyright: ignore[reportAttributeAccessIssue]
        filled[id(parameter)] = nn.Parameter(
            full.to(device, parameter.dtype, copy=True), parameter.requires_grad
        )
    buffers = dict(sharded.named_buffers())
    for prefix, module in whole.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]
        for name, buffer in module._buffers.items():
            source = buffers.get(f"{prefix}.{name}" if prefix else name)
            if buffer is not None and source is not None:
                module._buffers[name] = source.detach().to(device, buffer.dtype, copy=True)
