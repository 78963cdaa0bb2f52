"""What the Triton kernels share: tile sizes, the precision of a dot product, activations, the interpreter's quirk."""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Set once, when the kernels are first imported: the interpreter runs them on CPU tensors.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def dot_options(dtype: torch.dtype) -> tuple[str, bool]:
    """`PRECISION` and `WIDEN` of a kernel's dot products for operands of `dtype`.

    float32 follows `torch.backends.cuda.matmul.fp32_precision`, as dense torch does; what the older settings ask for
    (`allow_tf32`, `set_float32_matmul_precision`) reads the same there. Under the interpreter a bfloat16 `tl.dot`
    returns garbage, so operands are widened to float32 first there.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not INTERPRET
    return "tf32" if tf32 else "ieee", INTERPRET


# Triton's own functions of these names serve kernels too, and cost the host up to four microseconds a call.
def cdiv(count: int, size: int) -> int:
    """How many parts of `size` hold `count`."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


def token_tile(tokens: int) -> int:
    """Tokens per program: 16 for decoding, up to 128 for prefill and training."""
    return min(128, max(16, next_power_of_2(tokens)))


def unit_columns(matrix: Tensor) -> Tensor:
    """The matrix with each row's elements next to each other, for kernels that count on it."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """`acc + a @ b` in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of `linear.reference.ACTIVATIONS` of float32 values; NaN stays NaN.

    The tanh form of GELU, `x / 2 * (1 + tanh(u))`, is written as `x * sigmoid(2 u)`, which it equals.
    """
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        tl.static_assert(ACTIVATION == "")
    return x
