"""The mask in the forward pass of a dense layer, so that no optimizer, accumulation or resume can lose it.

A masked module keeps its class and its dense parameter, under its name. For the length of a forward pass the
parameter's place is taken by the *effective* weight: the parameter's blocks where the mask keeps them, 0 elsewhere.
`state_dict()` gives effective weights too, so that a checkpoint written while masked is an ordinary one that plain
`from_pretrained` loads.

The mask passes gradients straight through: `parameter.grad` is the gradient of the effective weight, pruned blocks
included (the signal movement scores and regrowth live on), summed over micro-batches and averaged over ranks as for
any parameter. `mask_gradients` zeroes its pruned blocks before the optimizer steps. Whatever an optimizer does to the
hidden entries (momentum, weight decay), the effective weight stays 0 there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockMask, BlockShape, block_sizes, to_blocks
from sparsify.conv_weight import ConvWeight
from sparsify.errors import CheckpointError, ConfigError
from sparsify.layers import kinds
from sparsify.pruner import PrunableLayer


def mask_model(model: nn.Module, masks: Mapping[str, BlockMask], dense_gradient: bool = True) -> None:
    """Puts masks into the forward pass of dense layers, or replaces those that are there.

    The parameters are not changed (see `unmask`). Of fused experts, matrices without a mask are kept whole.

    Args:
        model: A dense model; its linear layers, `Conv1D` layers, fused experts, LSTMs and GRUs can be masked.
        masks: For each layer's name (`PrunableLayer.name`) its mask.
        dense_gradient: Whether pruned blocks get the gradient of the effective weight too; call `mask_gradients`
            before each optimizer step then. `False` gives them no gradient at all, which is what training under a
            mask that no longer changes wants.

    Raises:
        ConfigError: If the model has no dense layer of a mask's name, or a mask does not fit its weight.
    """
    found: dict[str, tuple[nn.Module, PrunableLayer]] = {}
    for module_name, module in model.named_modules():
        if kinds.dense_kind(module) is not None:
            for layer in kinds.every_matrix(module_name, module):
                found[layer.name] = module, layer
    groups: dict[int, tuple[nn.Module, list[PrunableLayer]]] = {}
    for name, mask in masks.items():
        if name not in found:
            raise ConfigError(f"cannot mask {name!r}: the model has no dense layer of this name")
        module, layer = found[name]
        if mask.shape != layer.shape:
            raise ConfigError(
                f"cannot mask {name}: its weight is {layer.shape}, the mask is for {mask.shape}"
            )
        groups.setdefault(id(layer.parameter), (module, []))[1].append(layer)
    for module, layers in groups.values():
        _mask_parameter(module, layers, masks, dense_gradient)


def mask_gradients(model: nn.Module) -> None:
    """Zeroes the gradient of pruned blocks, in place; for the moment between `backward` and the optimizer's step."""
    for module, masked in _masked(model):
        parameter = module._parameters[masked.parameter]
        if parameter is not None and parameter.grad is not None:
            parameter.grad.copy_(masked.zeroed(parameter.grad, masked.keep(module)))


def current_masks(model: nn.Module) -> dict[str, BlockMask]:
    """The masks in force, by layer name, on the CPU."""
    masks: dict[str, BlockMask] = {}
    for module, masked in _masked(model):
        parameter = module._parameters[masked.parameter]
        assert parameter is not None
        rows, cols = parameter.shape[-2:]
        for name, index in masked.layers:
            keep = masked.keep(module).cpu()
            if masked.conv is not None:
                block = BlockShape(*masked.block, 1 if masked.conv.per_position else masked.conv.positions)
                masks[name] = BlockMask(keep[index or 0].clone(), masked.conv.shape, block)
                continue
            keep = keep if index is None else keep[index]
            if masked.transposed:
                block = BlockShape(masked.block[1], masked.block[0])
                masks[name] = BlockMask(keep.t().contiguous(), (cols, rows), block)
            else:
                masks[name] = BlockMask(keep.clone(), (rows, cols), BlockShape(*masked.block))
    return masks


@torch.no_grad()
def removed_share(model: nn.Module, layers: Iterable[PrunableLayer]) -> float:
    """Share of the layers' elements in blocks that are masked or zero by now, 0 to 1."""
    masks = current_masks(model)
    removed = total = 0
    for layer in layers:
        gone = to_blocks(layer.weight.abs(), layer.block).amax((2, 3)).eq(0).cpu()
        if layer.name in masks:
            gone |= ~masks[layer.name].keep
        removed += int(block_sizes(layer.shape, layer.block)[gone].sum())
        total += layer.shape[0] * layer.shape[1]
    return removed / total


@torch.no_grad()
def unmask(model: nn.Module) -> dict[str, BlockMask]:
    """Makes the masks permanent: writes zeros into pruned blocks and takes the masks out of the forward pass.

    Returns:
        The masks that were in force, by layer name, on the CPU.
    """
    masks = current_masks(model)
    for module, masked in list(_masked(model)):
        parameter = module._parameters[masked.parameter]
        assert parameter is not None
        parameter.copy_(masked.zeroed(parameter, masked.keep(module)))
    for module in model.modules():
        state = module.__dict__.pop("_masked_parameters", None)
        for masked in state or ():
            delattr(module, masked.buffer)
            module.__dict__.pop(masked.hidden, None)
        for handle in module.__dict__.pop("_mask_handles", ()):
            handle.remove()
    return masks


def save_masks(path: Path, masks: Mapping[str, BlockMask]) -> None:
    """Writes masks to a safetensors file, one `(R, C)` uint8 tensor a layer, their shapes in its metadata."""
    from safetensors.torch import save_file

    shapes = {name: [*mask.shape, *astuple(mask.block)] for name, mask in masks.items()}
    keeps = {name: mask.keep.to("cpu", torch.uint8).contiguous() for name, mask in masks.items()}
    save_file(keeps, path, metadata={"masks": json.dumps(shapes)})


def load_masks(path: Path) -> dict[str, BlockMask]:
    """Reads masks that `save_masks` wrote, on the CPU.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds no masks.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {})["masks"])
            return {
                name: BlockMask(file.get_tensor(name).bool(), (n, k), BlockShape(*block))
                for name, (n, k, *block) in shapes.items()
            }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"cannot read block masks from {path}: {error}") from error


@dataclass
class _MaskedParameter:
    """One masked parameter of a module; the mask and its block are in the parameter's own layout."""

    parameter: str
    block: tuple[int, int]
    transposed: bool
    layers: list[tuple[str, int | None]]
    dense_gradient: bool
    conv: ConvWeight | None = None

    @property
    def buffer(self) -> str:
        return f"{self.parameter}_keep"

    @property
    def hidden(self) -> str:
        """Where a module holds its parameter during a forward pass."""
        return f"_hidden_{self.parameter}"

    def keep(self, module: nn.Module) -> Tensor:
        return module._buffers[self.buffer]  # pyright: ignore[reportReturnType]

    def effective(self, module: nn.Module) -> Tensor:
        weight = module._parameters.get(self.parameter)
        if weight is None:  # a replica made by nn.DataParallel holds plain tensors
            weight = module.__dict__[self.parameter]
        if self.dense_gradient:
            return _StraightThrough.apply(weight, self.keep(module), self)  # pyright: ignore
        return self.zeroed(weight, self.keep(module))

    def zeroed(self, weight: Tensor, keep: Tensor) -> Tensor:
        """A tensor laid out as the parameter with 0 (never -0 or NaN) where `keep` `(..., R, C)` is False."""
        shape = weight.shape if self.conv is None else self.conv.shape
        whole = all(size % side == 0 for size, side in zip(shape[-2:], self.block, strict=True))
        if (
            whole and self.conv is None and not _is_sharded(weight)
        ):  # blocks are a view: nothing is written out
            blocks = weight.unflatten(-1, (-1, self.block[1])).unflatten(-3, (-1, self.block[0]))
            return torch.where(keep[..., :, None, :, None], blocks, 0).flatten(-2).flatten(-3, -2)
        elements = keep.repeat_interleave(self.block[0], -2).repeat_interleave(self.block[1], -1)
        elements = elements[..., : shape[-2], : shape[-1]]
        return _zero(weight, elements if self.conv is None else self.conv.join(elements))


def _masked(model: nn.Module) -> Iterator[tuple[nn.Module, _MaskedParameter]]:
    for module in model.modules():
        for masked in module.__dict__.get("_masked_parameters", ()):
            yield module, masked


def _mask_parameter(
    module: nn.Module, layers: list[PrunableLayer], masks: Mapping[str, BlockMask], dense_gradient: bool
) -> None:
    first = layers[0]
    parameter = next(name for name, value in module._parameters.items() if value is first.parameter)
    blocks = {masks[layer.name].block for layer in layers}
    if len(blocks) > 1:
        raise ConfigError(
            f"cannot mask {first.module_name}: its matrices have masks of different block shapes"
        )
    block = blocks.pop()
    lead = first.parameter.shape[:-2] if first.conv is None else (first.conv.count,)
    keep = torch.ones(*lead, *block.grid(first.shape), dtype=torch.bool)
    for layer in layers:
        index = layer.index if layer.conv is None else layer.index or 0
        (keep if index is None else keep[index]).copy_(masks[layer.name].keep)
    rows, cols = block.rows, block.cols
    if first.transposed:
        keep, rows, cols = keep.transpose(-1, -2).contiguous(), cols, rows
    masked = _MaskedParameter(
        parameter,
        (rows, cols),
        first.transposed,
        [(layer.name, layer.index) for layer in layers],
        dense_gradient,
        first.conv,
    )
    state = module.__dict__.setdefault("_masked_parameters", [])
    state[:] = [other for other in state if other.parameter != parameter] + [masked]
    module.register_buffer(masked.buffer, keep.to(first.parameter.device), persistent=False)
    if "_mask_handles" not in module.__dict__:
        module._mask_handles = [  # pyright: ignore[reportArgumentType]
            # Inside of FSDP's hooks, which put another parameter in the place before a pass and after it.
            module.register_forward_pre_hook(_show_effective),
            module.register_forward_hook(_show_parameters, prepend=True, always_call=True),
            module.register_state_dict_post_hook(_save_effective),
        ]


def _show_effective(module: nn.Module, args: Any) -> None:
    # torch.compile (2.11) traces a change of `_parameters`, and not an attribute that is removed again.
    for masked in module.__dict__["_masked_parameters"]:
        effective: Any = masked.effective(module)
        if masked.parameter in module.__dict__:  # a replica made by nn.DataParallel, which is used once
            module.__dict__[masked.parameter] = effective
            continue
        module.__dict__[masked.hidden] = module._parameters[masked.parameter]
        module._parameters[masked.parameter] = effective
    _renew_list(module)


def _show_parameters(module: nn.Module, args: Any, output: Any) -> None:
    for masked in module.__dict__["_masked_parameters"]:
        parameter = module.__dict__.get(masked.hidden)
        if parameter is not None:
            module._parameters[masked.parameter] = parameter
            module.__dict__[masked.hidden] = None
    _renew_list(module)


def _renew_list(module: nn.Module) -> None:
    """torch's recurrent layers read their weights from a list of their own."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]  # pyright: ignore


def _save_effective(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for masked in module.__dict__["_masked_parameters"]:
        key = prefix + masked.parameter
        if key in state_dict:
            keep_vars = state_dict[key].requires_grad
            plain = masked.zeroed(state_dict[key].detach(), masked.keep(module))
            state_dict[key] = masked.effective(module) if keep_vars else plain


class _StraightThrough(torch.autograd.Function):
    """Zeroes pruned blocks in the forward pass; hands the gradient on unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor, masked: _MaskedParameter) -> Tensor:
        return masked.zeroed(weight, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _is_sharded(weight: Tensor) -> bool:
    return hasattr(weight, "device_mesh")


def _zero(weight: Tensor, elements: Tensor) -> Tensor:
    if _is_sharded(weight):  # by FSDP: each rank masks its own part
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = weight.device_mesh, weight.placements  # pyright: ignore[reportAttributeAccessIssue]
        elements = distribute_tensor(elements, mesh, placements, src_data_rank=None)
    return torch.where(elements, weight, 0)
