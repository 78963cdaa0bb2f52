"""Swapping dense layers of a model for block-sparse ones, in place."""

from __future__ import annotations

from torch import nn

from sparsify.blocks import BlockMask
from sparsify.errors import SparsifyError
from sparsify.layers.fusion import fuse
from sparsify.layers.kinds import every_matrix, to_sparse
from sparsify.layers.packed import PackedModule


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where `model` has the submodule `name`; accelerate's device hooks move over.

    Raises:
        SparsifyError: If `name` is empty: nothing can take the place of the model itself.
    """
    if not name:
        raise SparsifyError(
            f"nothing can take the place of the model itself, a {type(model).__name__}: put it into a module first, as "
            f"in nn.Sequential(model)"
        )
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    hook = getattr(parent.get_submodule(child), "_hf_hook", None)
    setattr(parent, child, new)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def convert(model: nn.Module, masks: dict[str, BlockMask]) -> None:
    """Swaps every layer that has a mask for its block-sparse equivalent; weights outside the masks are gone after it.

    MLPs that are block-sparse then are fused, see `fusion`.

    Args:
        model: Dense model.
        masks: Mask of each weight matrix by `PrunableLayer.name`.

    Raises:
        SparsifyError: If a mask names no weight of the model, or a layer cannot be swapped.
    """
    by_module: dict[str, dict[str, BlockMask]] = {}
    unclaimed = set(masks)
    for name, module in model.named_modules():
        own = {layer.name for layer in every_matrix(name, module)} & unclaimed
        if own:
            by_module[name] = {key: masks[key] for key in own}
            unclaimed -= own
    if unclaimed:
        raise SparsifyError(f"masks name no dense weight of the model: {', '.join(sorted(unclaimed)[:3])}")
    for name, own in by_module.items():
        replace_module(model, name, to_sparse(name, model.get_submodule(name), own))
    fuse(model)


def sparse_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Every block-sparse module of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def masks_of(model: nn.Module) -> dict[str, BlockMask]:
    """Mask of every block-sparse weight matrix by the name that its dense `PrunableLayer` had."""
    masks: dict[str, BlockMask] = {}
    for module_name, module in sparse_modules(model).items():
        masks |= module.named_masks(module_name)
    return masks
