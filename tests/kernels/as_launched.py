"""A program: compiles kernels without a GPU with the very arguments that their launchers give them.

    python as_launched.py CAPABILITY BYTES CASE...

What a kernel is compiled for depends on its arguments: a 1 becomes a constant, a missing bias has no type, an address
or a stride may be a multiple of 16 bytes or not. Neither Triton's interpreter nor a list of types written for a test
sees that. Here Triton itself looks at the arguments, and stops short of the launch. Prints a line of JSON a kernel,
with its shared memory, under the `BYTES` that a multiprocessor of the GPU has, and its registers.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from sparsify.kernels import launch as launching
from sparsify.kernels.storage import Topology, topology

STEPS = 5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Driver:
    """What Triton asks of a GPU's driver before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def install(capability: int, shared: int) -> None:
    """From here on, launches compile for a GPU that is not there."""
    driver.set_active(Driver(capability))  # pyright: ignore[reportArgumentType]
    properties = SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *_: properties  # pyright: ignore[reportAttributeAccessIssue]

    def launch(
        kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], device: Any,
        **options: int,
    ) -> Any:  # fmt: skip
        def run(*given: Any, **asked: int) -> Any:
            compiled = kernel.warmup(*given, grid=grid, **asked)
            if compiled.metadata.shared > shared:
                raise OutOfResources(compiled.metadata.shared, shared, "shared memory")
            return compiled

        compiled = launching._first(run, (*arguments, *constants), options)
        found = {"kernel": kernel.__name__, "shared": compiled.metadata.shared, "grid": grid}
        print(json.dumps(found | {"stages": compiled.metadata.num_stages}), flush=True)
        return SimpleNamespace(run=None)

    launching.launch = launch


def random(rows: int, cols: int, share: float = 0.4) -> Topology:
    """Random indices of a matrix of so many blocks."""
    keep = torch.rand(rows, cols) < share
    keep[0, 0] = True
    crow = torch.cat([torch.zeros(1), keep.sum(1).cumsum(0)]).to(torch.int32)
    return topology(crow, keep.nonzero()[:, 1].to(torch.int32), cols)


def recurrence(dtype: torch.dtype, block: tuple[int, int], batch: int, units: int, lstm: bool) -> None:
    """All steps of an LSTM or GRU in one launch, and the way back."""
    from sparsify.kernels.recurrent import triton_recurrence

    width = (4 if lstm else 3) * units
    topo = random(width // block[0], units // block[1], 0.1)
    values = torch.empty(len(topo.col), block[1], block[0], dtype=dtype)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind)

    rows, wide = STEPS * batch, torch.float32
    c, before = (empty(batch, units, kind=wide), empty(rows, units, kind=wide)) if lstm else (None, None)
    y, saved, h = empty(rows, units), empty(rows, 4 * units), empty(batch, units)
    rest = values, topo, None, STEPS, False, y
    triton_recurrence.forward(empty(rows, width), h, c, *rest, saved, before)
    triton_recurrence.forward(empty(rows, width), h, c, *rest, None, None)
    dgates = empty(rows, width)
    triton_recurrence.backward(
        y, h, empty(batch, units, kind=wide), saved, y if before is None else before, values, topo, STEPS, False, lstm,
        dgates, dgates if lstm else empty(rows, width),
    )  # fmt: skip


def convolution(
    dtype: torch.dtype, block: tuple[int, int], sizes: tuple[int, ...], batch: int, side: int
) -> None:
    """A convolution and both its gradients, of channels-last images and of others."""
    from sparsify.kernels.convolution import triton_conv
    from sparsify.kernels.convolution.geometry import Geometry, conv_topology

    geometry = Geometry(*sizes)
    rows, cols = geometry.grid(block[1], block[0])
    indices = random(geometry.groups * rows, geometry.positions * cols)
    topo = conv_topology(indices.crow, indices.col, geometry, cols)
    values = torch.empty(len(topo.col), block[1], block[0], dtype=dtype)
    out = geometry.out_size(side, side)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):

        def images(height: int, width: int, channels: int, order: tuple[int, ...] = order) -> Tensor:
            shape = [batch, height, width, channels]
            stored = shape if order[1] == 1 else [batch, channels, height, width]
            return torch.empty(stored, dtype=dtype).permute(order)

        x, dy = images(side, side, geometry.in_channels), images(*out, geometry.out_channels)
        triton_conv.conv(x, values, None, topo, geometry)
        triton_conv.conv_dx(dy, values, topo, geometry, side, side)
        triton_conv.conv_dw(dy, x, topo, geometry, block[1], block[0])


def experts(
    dtype: torch.dtype, block: tuple[int, int], count: int, tokens: int, top: int, gated: bool
) -> None:
    """Products with all experts' matrices, sorting and padding before them."""
    from sparsify.kernels.grouped import triton_grouped, triton_padding

    slots, wide, narrow = tokens * top, 512, 256
    parts = [random(wide // block[0], narrow // block[1]) for _ in range(count)]
    ends = torch.tensor([len(part.col) for part in parts]).cumsum(0).tolist()
    crow = [part.crow[:-1] + start for part, start in zip(parts, [0, *ends], strict=False)]
    joined = [torch.cat(same) for same in zip(*(part[1:] for part in parts), strict=True)]
    topo = Topology(torch.cat([*crow, torch.tensor(ends[-1:], dtype=torch.int32)]).to(torch.int32), *joined)
    values = torch.empty(ends[-1], block[1], block[0], dtype=dtype)
    groups = triton_grouped.group(torch.zeros(min(slots, 1024), dtype=torch.int64), count)
    groups = groups._replace(order=torch.zeros(slots, dtype=torch.int32))
    x, dy = torch.empty(tokens, narrow, dtype=dtype), torch.empty(slots, wide, dtype=dtype)
    activation, scale = ("silu", torch.empty(slots)) if gated else ("", None)
    triton_grouped.grouped(x, values, None, topo, groups, wide, activation, scale, gated)
    triton_grouped.grouped_dx(dy, values, topo, groups, narrow)
    triton_grouped.grouped_dw(dy, x, topo, groups, block[1], block[0])
    padding = triton_padding.pad(groups, 128, 4, 132)
    padded = triton_padding.gather(x, padding)
    triton_padding.scatter(padded, padding, activation, scale, gated)


def linear(dtype: torch.dtype, block: tuple[int, int], tokens: int) -> None:
    """The portable kernels of a linear layer."""
    from sparsify.kernels.linear import triton_dds, triton_decode, triton_dsd, triton_sdd

    topo = random(512 // block[0], 256 // block[1])
    values = torch.empty(len(topo.col), block[1], block[0], dtype=dtype)
    x, dy = torch.empty(tokens, 256, dtype=dtype), torch.empty(tokens, 512, dtype=dtype)
    triton_dsd.dsd(x, values, None, topo, 512)
    triton_dds.dds(dy, values, topo, 256)
    triton_sdd.sdd(dy, x, topo, block[1], block[0])
    if tokens <= triton_decode.MAX_TOKENS:
        triton_decode.dsd(x, values, None, topo, 512)


# Convolutions: groups, channels in and out, kernel, stride, margins.
THREE = (1, 256, 256, 3, 3, 1, 1, 1, 1, 1, 1)
SEVEN = (1, 3, 64, 7, 7, 2, 2, 3, 3, 3, 3)
GROUPS = (4, 128, 128, 3, 3, 2, 2, 1, 1, 1, 1)
ONE = (1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1)
CASES: dict[str, tuple[Any, ...]] = {
    "one-sequence": (recurrence, "bf16", (64, 64), 1, 256, True),
    "many-units": (recurrence, "bf16", (32, 32), 128, 4096, True),
    "gru": (recurrence, "fp16", (16, 16), 17, 64, False),
    "recurrence-fp32": (recurrence, "fp32", (128, 128), 128, 2048, True),
    "recurrence-tf32": (recurrence, "tf32", (64, 64), 16, 1024, False),
    "conv": (convolution, "bf16", (64, 64), THREE, 8, 28),
    "conv-one-pixel": (convolution, "bf16", (8, 8), ONE, 1, 1),
    "conv-many-positions": (convolution, "bf16", (16, 8), SEVEN, 2, 56),
    "conv-groups": (convolution, "fp16", (32, 32), GROUPS, 2, 28),
    "conv-small-fp32": (convolution, "fp32", (8, 8), THREE, 1, 7),
    "conv-large": (convolution, "tf32", (256, 256), THREE, 8, 28),
    "conv-flat": (convolution, "fp16", (256, 8), THREE, 8, 28),
    "one-slot": (experts, "bf16", (64, 64), 8, 1, 1, True),
    "one-expert": (experts, "bf16", (64, 64), 1, 64, 1, False),
    "decoding-experts": (experts, "bf16", (128, 16), 60, 16, 4, True),
    "many-experts": (experts, "bf16", (64, 64), 256, 512, 8, True),
    "small-experts": (experts, "fp32", (8, 8), 8, 64, 2, False),
    "large-experts": (experts, "tf32", (256, 256), 8, 2048, 2, True),
    "linear-small": (linear, "bf16", (8, 8), 1),
    "linear-large": (linear, "tf32", (256, 256), 2048),
    "linear-flat": (linear, "fp32", (256, 8), 16),
}


def main(capability: str, shared: str, *names: str) -> None:
    install(int(capability), int(shared))
    for name in names:
        work, dtype, *arguments = CASES[name]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        work(DTYPES[dtype], *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
