"""The two inspections of a load: the files' headers before any weight is read, and what has arrived after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsify.checkpoint.conversions import KeyMap
from sparsify.checkpoint.files import StoredTensor, read_headers
from sparsify.checkpoint.format import packed_names
from sparsify.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.checkpoint.quantizer import BlockSparseQuantizer
    from sparsify.layers.packed import PackedModule


def check_files(model: PreTrainedModel, quantizer: BlockSparseQuantizer, files: Sequence[str]) -> None:
    """Checks that the files are whole and hold packed weights of the shapes that `config.json` announces.

    Args:
        model: The model on the meta device, its block-sparse layers swapped in.
        quantizer: Its quantizer.
        files: Paths of the checkpoint's weight files.

    Raises:
        CheckpointError: If a file is truncated, damaged or a pickle, or a packed weight has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    from sparsify.layers.swap import sparse_modules

    stored = read_headers(files)
    to_model = KeyMap(model, get_model_conversion_mapping(model, None, quantizer))
    by_name = {to_model(key): tensor for key, tensor in stored.items()}
    for module_name, module in sparse_modules(model).items():
        expected = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name in packed_names(module):
            tensor = by_name.get(f"{module_name}.{name}")
            if tensor is not None:
                _check_tensor(f"{module_name}.{name}", tensor, tuple(expected[name].shape))


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)} in {tensor.file.name}, but config.json announces {list(shape)}: "
            f"the checkpoint is damaged or mixes files of two checkpoints"
        )
    if name.endswith("_indices") and tensor.dtype != "I32":
        raise CheckpointError(
            f"{name} is {tensor.dtype} in {tensor.file.name}, expected I32: the file is damaged"
        )


def check_loaded(modules: Mapping[str, PackedModule]) -> None:
    """Checks that every packed tensor came from the files.

    transformers merely warns when a tensor is missing and makes one up, which for an index would be garbage.

    Args:
        modules: The block-sparse modules by name, straight after loading.

    Raises:
        CheckpointError: If one was not in the files.
    """
    for module_name, module in modules.items():
        for name in packed_names(module):
            tensor = getattr(module, name)
            # Offloaded to disk: still there, and without the mark that loading leaves on what it has read.
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the checkpoint has no tensor {module_name}.{name}: a weight file is missing or damaged"
                )
