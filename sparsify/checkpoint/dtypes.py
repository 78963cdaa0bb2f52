"""Dtypes of a loaded model: what was asked for, wherever transformers forgets.

transformers 5.17 keeps the file's dtype for every tensor of a quantized checkpoint that it renames, as it does when a
bare encoder is loaded from a checkpoint with a head: `dtype=` is then ignored in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def wanted(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype that each floating parameter should have after loading.

    Args:
        model: The model on the meta device, made in the dtype asked for.
    """
    plan = model._get_dtype_plan(model.dtype)  # patterns of what stays float32 in half precision
    return {
        name: next((dtype for glob, dtype in plan.items() if _matches(glob, name)), parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }


def _matches(glob: str, name: str) -> bool:
    return re.search(glob.replace("*", ".*"), name) is not None


def settle(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Casts, in place, the parameters that did not get the dtype that `wanted` said."""
    for name, parameter in model.named_parameters():
        dtype = dtypes.get(name, parameter.dtype)
        if parameter.dtype != dtype and parameter.device.type != "meta":
            parameter.data = parameter.data.to(dtype)
