"""The way back: a block-sparse model or checkpoint as an ordinary dense one, for any runtime."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsify.checkpoint import plain, reader, writer
from sparsify.checkpoint.sources import module_class
from sparsify.errors import CheckpointError, OutputError
from sparsify.layers.fusion import unfuse
from sparsify.layers.kinds import dense_parameters
from sparsify.layers.swap import replace_module, sparse_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.layers.packed import PackedModule


def swap_out(model: nn.Module, skeleton: nn.Module) -> None:
    """Replaces every block-sparse layer by the dense one it stands for, zeros where no block is stored, in place.

    Args:
        model: A model with its weights in memory.
        skeleton: The dense model, on any device; of a transformers model its `dense_skeleton`.
    """
    unfuse(model)
    for name, sparse in sparse_modules(model).items():
        replace_module(model, name, dense_equivalent(sparse, skeleton.get_submodule(name)))


def dense_skeleton(model: Any) -> PreTrainedModel:
    """The dense model of the architecture of a transformers model on the meta device, without weights."""
    config = deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)._from_config(config)


def dense_equivalent(sparse: PackedModule, dense: nn.Module) -> nn.Module:
    """The dense layer that a block-sparse one stands for, zeros where no block is stored.

    Args:
        sparse: The block-sparse layer.
        dense: The layer of the same name of `dense_skeleton`; left as it is.

    Returns:
        A copy of `dense` with weights of its own; it shares what the sparse layer does not pack, such as a bias.
    """
    dense = deepcopy(dense)
    # By attribute, because recurrent layers also keep a list of their weights.
    for key, tensor in dense_parameters(sparse).items():
        setattr(dense, key, nn.Parameter(tensor, sparse.get_parameter(key).requires_grad))
    for key, parameter in sparse.named_parameters(recurse=False):
        if key not in sparse.packed:
            setattr(dense, key, parameter)
    return dense.train(sparse.training)


def densify(path: str | Path, out: str | Path, force: bool = False, module: nn.Module | None = None) -> Path:
    """Writes the ordinary dense checkpoint that a block-sparse one stands for.

    Kept weights are bit-identical, removed ones are zero; names and layout are those of the architecture, so that
    plain `from_pretrained` reads the result without this package.

    Args:
        path: Block-sparse checkpoint: a folder, or a name on the Hub.
        out: Folder to write.
        force: Replace an existing checkpoint in `out`.
        module: For the checkpoint of a plain module, a dense one of its class, which is filled in place.

    Returns:
        The folder written.

    Raises:
        CheckpointError: If `path` cannot be read or is dense already, or does not fit `module`.
        OutputError: If `out` exists, cannot be written or does not fit on its disk.
    """
    plan(path, out, force, module)
    if module is not None:
        filled = plain.load(path, module)
        with writer.new_folder(Path(out).expanduser().resolve(), force) as folder:
            plain.write_dense(filled, folder)
        return Path(out).expanduser().resolve()
    model = reader.load(path)
    model.dequantize()
    return writer.save(model, out, processor=reader.load_processor(path), force=force)


def plan(
    path: str | Path, out: str | Path, force: bool = False, module: nn.Module | None = None
) -> tuple[reader.CheckpointInfo, int]:
    """Checks that `densify` can do its work, without loading weights.

    Returns:
        The checkpoint's description, and the bytes of weights that would be written.

    Raises:
        CheckpointError: If `path` cannot be read or is dense already.
        OutputError: If `out` exists, cannot be written or does not fit on its disk.
    """
    info = reader.open_checkpoint(path)
    plain_class = module_class(info.config)
    if plain_class is not None and module is None:
        raise CheckpointError(
            f"{path} holds the weights of a plain module, {plain_class}, which your own code builds: say what builds "
            f"it, as in --module {plain_class} (in Python sparsify.densify(path, out, model=...))"
        )
    if not info.layers:
        raise CheckpointError(f"{path} is a dense checkpoint already: there is nothing to densify")
    if Path(out).expanduser().resolve() == info.path.resolve():
        raise OutputError(f"{out} is the checkpoint's own folder: choose another output folder")
    needed = info.dense_bytes + sum(layer.bytes_dense for layer in info.layers)
    writer.check_output(out, force, needed)
    return info, needed
