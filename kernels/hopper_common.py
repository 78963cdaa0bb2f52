"""What the Hopper kernels share: Gluon's names, layouts, the ring of stages, and when they can run.

Each program has three warp-specialised parts: one producer warp, which streams tiles from global to shared memory with
the copy engine (TMA), and two consumer warpgroups, which multiply them on the tensor cores (WGMMA). They hand over
stages of a ring in shared memory through `full` and `empty` barriers. Gluon does not run in Triton's interpreter: on
other devices, and where Gluon is missing, the plain Triton kernels serve.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# ^ jitted functions are compiled by Triton, whose types pyright does not know

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Gluon renamed these after triton 3.7.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_RENAMED: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
NARROW_LAYOUTS = {64: LAYOUT, 32: gl.NVMMASharedLayout(64, 16, 2), 16: gl.NVMMASharedLayout(32, 16, 2)}
DTYPES = (torch.float16, torch.bfloat16)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU: the number of persistent programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def aligned(*tensors: Tensor) -> bool:
    """Whether the copy engine can address these matrices: row-major, rows and base 16-byte aligned, not empty."""
    return all(
        t.numel() > 0 and t.stride(-1) == 1 and t.stride(0) * 2 % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
    )


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of a row-major `(a, b)` matrix that is read or written in boxes of `rows x columns`."""
    layout = NARROW_LAYOUTS[columns] if columns < 64 else LAYOUT
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns], layout)


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """The activation function of an epilogue, in float32; see `linear.reference.ACTIVATIONS`."""
    if ACTIVATION == "relu":
        return gl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        # The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26): CUDA's own takes more registers than are left.
        t = 1.0 / (1.0 + 0.23164190 * gl.abs(x))
        tail = t * (
            0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        )
        tail = x * tail * gl.exp(-0.5 * x * x)
        return gl.where(x >= 0, x - tail, tail)
    elif ACTIVATION == "gelu_tanh":
        return x / (1.0 + gl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        return x / (1.0 + gl.exp(-x))
    else:
        return x


@gluon.jit
def view_as(buffer, DTYPE: gl.constexpr, SHAPE: gl.constexpr, SHARED: gl.constexpr):
    """The same shared memory seen in another shape."""
    if _RENAMED:
        return buffer.reinterpret(DTYPE, SHAPE, SHARED)
    else:
        return buffer._reinterpret(DTYPE, SHAPE, SHARED)


@gluon.jit
def make_ring(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of a ring of stages: filled by one producer, emptied by all consumers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def store_transposed(desc, acc, staging, row, column, TOKENS: gl.constexpr):
    """Writes a `[64, TOKENS]` accumulator as the `(TOKENS, 64)` tile at `(row, column)`, in two halves."""
    HALF: gl.constexpr = TOKENS // 2
    LAYOUT_HALF: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16]
    )
    low, high = acc.to(desc.dtype).reshape([64, 2, HALF]).permute([0, 2, 1]).split()
    tma.store_wait(0)
    staging.permute((1, 0)).store(gl.convert_layout(low, LAYOUT_HALF))
    fence_async_shared()
    if column >= 0:
        store_tile(desc, [row, column], staging)
    tma.store_wait(0)
    staging.permute((1, 0)).store(gl.convert_layout(high, LAYOUT_HALF))
    fence_async_shared()
    if column >= 0:
        store_tile(desc, [row + HALF, column], staging)
