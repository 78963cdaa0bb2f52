"""Whether two outputs agree as well as their dtype allows. A speed is only reported where they do."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import SparsifyError

# Largest relative error (Frobenius norm) of one layer against float64, and of a whole model's output against that of
# its dense twin of the same dtype, in which the rounding of every layer adds up.
LAYER = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MODEL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.1}
LAYER_TF32, MODEL_TF32 = 1e-3, 2e-2
# A single element may be off by this much more than the whole. One wrong element in millions does not show in a norm.
ELEMENT = 8


def layer_budget(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of one product of this dtype."""
    return LAYER_TF32 if _is_tf32(dtype, device) else LAYER[dtype]


def off_by(actual: Tensor, exact: Tensor, scale: Tensor) -> tuple[float, float]:
    """Relative error of an output as a whole, and of its worst element; see `check_layer`."""
    off = (actual.to(exact.dtype) - exact).abs()
    error = (off.norm() / exact.norm().clamp_min(1e-30)).item()
    worst = (off / (exact.abs() + scale).clamp_min(1e-30)).max().item() if off.numel() else 0.0
    return error, worst


def check_layer(name: str, actual: Tensor, exact: Tensor, scale: Tensor, budget: float) -> float:
    """Checks a layer's output as a whole and element by element.

    Args:
        name: The layer, for the message.
        actual: `(M, N)`, what the layer gave.
        exact: `(M, N)`, what it should have given, of higher precision.
        scale: Usual size of the outputs, `(N,)` or a single value; zero where the output must be exact.
        budget: Largest relative error.

    Returns:
        The relative error.

    Raises:
        SparsifyError: If the error exceeds the budget; also if something is NaN.
    """
    error, worst = off_by(actual, exact, scale)
    # Written so that NaN fails.
    if not (error <= budget and worst <= ELEMENT * budget):
        raise SparsifyError(
            f"{name} at {_tokens(actual)} differs from its dense equivalent by {error:.2g} (one element by "
            f"{worst:.2g}), more than the {budget:.2g} ({ELEMENT * budget:.2g}) that {_short(actual.dtype)} allows; "
            f"nothing is reported: a kernel is wrong here, please report the layer and this machine"
        )
    return error


def check_model(actual: Tensor, expected: Tensor, routed: bool, where: str = "") -> float:
    """Checks a whole model's output, token by token.

    Args:
        actual: `(..., tokens, D)` of the sparse model.
        expected: The same of its dense twin.
        routed: Whether tokens are routed to experts. Rounding can then send single tokens another way, so that half
            of the tokens must agree instead of all.
        where: What was done, for the message; else the number of tokens.

    Returns:
        The relative error of the token that decides.

    Raises:
        SparsifyError: If the error exceeds the dtype's budget; also if something is NaN.
    """
    dtype, device = actual.dtype, actual.device
    budget = MODEL_TF32 if _is_tf32(dtype, device) else MODEL[dtype]
    actual, expected = (output.flatten(0, -2).double() for output in (actual, expected))
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    error = (errors.median() if routed else errors.max()).item()
    if not error <= budget:
        raise SparsifyError(
            f"the sparse model's output at {where or _tokens(actual)} differs from that of its dense equivalent by "
            f"{error:.2g}, more than the {budget:.2g} that {_short(dtype)} allows; nothing is reported"
        )
    return error


def _is_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    return (
        dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tokens(output: Tensor) -> str:
    return "1 token" if len(output) == 1 else f"{len(output)} tokens"
