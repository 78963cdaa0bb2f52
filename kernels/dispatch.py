"""Which kernel runs a product: the one place where that is decided.

    reference        CPU and other devices, float64
    triton_decode    forward of up to 32 tokens
    hopper_linear    forward and input gradient, 16-bit, block sides multiples of 64
    hopper_tall      forward, 16-bit, blocks at least 128 high and 16 or 32 wide
    hopper_sdd       weight gradient, 16-bit, block sides multiples of 64
    triton_*         everything else on a GPU

The Hopper kernels need compute capability 9, Gluon (triton 3.6 or newer) and rows that start at 16-byte addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels import reference

log = logging.getLogger("sparsify.kernels")


@cache
def _hopper(device: torch.device) -> bool:
    """Whether the warp-specialised kernels run on this device; says once why not where one would expect them."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import_module("sparsify.kernels.hopper_common")
    except (ImportError, AttributeError) as error:
        log.warning("this Triton has no Gluon for Hopper (%s): the slower portable kernels are used", error)
        return False
    return True


def _kernel(module: str, name: str) -> Callable[..., Tensor]:
    return getattr(import_module(f"sparsify.kernels.{module}"), name)


def _fast(*operands: Tensor) -> bool:
    """Whether the Hopper kernels take these matrices."""
    first = operands[0]
    if first.dtype not in (torch.float16, torch.bfloat16) or not _hopper(first.device):
        return False
    from sparsify.kernels.hopper_common import aligned

    return aligned(*operands)


def _squares(block: torch.Size | tuple[int, int]) -> bool:
    return block[0] % 64 == 0 and block[1] % 64 == 0


def choose(
    name: str, operand: Tensor, other: Tensor, block: tuple[int, int], width: int
) -> Callable[..., Any]:
    """The function that runs one product.

    Args:
        name: `dsd`, `dds` or `sdd`.
        operand: `x`, `dy` or `dy`.
        other: `values`, `values` or `x`.
        block: `(bi, bo)`.
        width: Columns of the result, of `dsd` and `dds`.
    """
    if operand.device.type != "cuda" or operand.dtype == torch.float64:
        return getattr(reference, name)
    block_in, block_out = block
    tokens = operand.shape[0]
    writable = width % 8 == 0  # the copy engine writes rows that start at 16-byte addresses
    if name == "dsd":
        if 0 < tokens <= 32 and operand.stride(1) == 1:
            return _kernel("triton_decode", "dsd")
        if other.numel() and writable and _fast(operand, other.view(-1, block_out)):
            if _squares(block):
                return _kernel("hopper_linear", "dsd")
            if block_out >= 128 and block_in in (16, 32):  # the tensor cores take 16 columns at a time
                return _kernel("hopper_tall", "dsd")
    elif name == "dds":
        if other.numel() and writable and _squares(block) and _fast(operand, other.view(-1, block_out)):
            return _kernel("hopper_linear", "dds")
    elif _squares(block) and _fast(operand, other):
        return _kernel("hopper_sdd", "sdd")
    return _kernel(f"triton_{name}", name)
