"""A model of a checkpoint's configuration whose weights are drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsify.checkpoint.reader import TASKS, first_line, labels_of
from sparsify.checkpoint.sources import local_folder, read_config
from sparsify.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def draw(
    path: str | Path,
    device: str | torch.device,
    dtype: str | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    label2id: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """Builds the model that a checkpoint's `config.json` describes, with random weights as its class initialises them.

    They are drawn on the CPU, so that one seed means the same weights on every device.

    Args:
        path: A folder, or a name on the Hub; weight files need not be there.
        device: Where to put the model.
        dtype: Dtype of the weights, such as `"bfloat16"`. Default: the config's.
        task: A recipe's task; by default the class that the config names.
        trust_remote_code: Run the Python code that comes with the checkpoint, where transformers has none for it.
        seed: Decides the weights.
        label2id: Classes of a classifier, instead of the config's.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If there is no config, it is of a quantized or block-sparse model, or no class fits it.
    """
    import transformers

    folder = local_folder(path)
    if "quantization_config" in read_config(folder):
        raise CheckpointError(
            f"{path} is quantized or block-sparse: from_scratch needs the config of a dense model"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            **(labels_of(label2id) if label2id is not None else {}),
        )
        precise = getattr(torch, dtype) if dtype is not None else config.dtype or torch.float32
        named = [name for name in config.architectures or [] if hasattr(transformers, name)]
        # The seed of whoever calls stays as it is.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if task is None and named:
                model = getattr(transformers, named[0])._from_config(config, dtype=precise)
            else:
                auto = getattr(transformers, TASKS[task] if task is not None else "AutoModel")
                model = auto.from_config(config, dtype=precise, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged config makes transformers stumble over
        raise CheckpointError(f"cannot make the model of {path}: {first_line(error)}") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval().to(device)
