"""ResNet-50's convolutions, block-sparse against cuDNN: forward and training, by block shape and sparsity.

Prerequisite: a CUDA GPU, and this package installed or on the path. The command behind docs/benchmarks:

    python scripts/bench_conv.py --out docs/benchmarks

Dense is `nn.Conv2d` on channels-last images with cuDNN in benchmark mode and random weights (zeros would draw less
power); sparse is the whole `BlockSparseConv2d` call. Correctness comes first: an output or gradient that is off from
the dense layer's in float32 is an error, not a number. Times are medians of single calls replayed as CUDA graphs,
contestants in turns, the L2 cache flushed before each. Masks are uniformly random; where a 3x3 weight has too few
blocks to share one mask among its positions at the sparsity asked for, each position has its own (`each`), and where
that does not help either the layer is left out. The *limit* is the speed-up that a layer could have if it took no
longer than its kept arithmetic or its images, read and written once, whichever is more, at the speeds of a dense
product and of a copy here.

`--part search` times other tile sizes of the 3x3 kernels instead, to choose their defaults by.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench_rows import write_pages
from sparsify import BlockShape, BlockSparseConv2d, measure
from sparsify.bench.limits import Limits, machine_limits
from sparsify.bench.timing import race


@dataclass(frozen=True)
class Layer:
    """A convolution of the network.

    Attributes:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Side of the kernel.
        stride: Stride.
        shrink: How often the image's side has been halved before it.
        count: How many the network has.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    shrink: int
    count: int

    @property
    def name(self) -> str:
        """Such as `3x3 256-256 /16`, with the stride where there is one."""
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.inputs}-{self.outputs} /{2**self.shrink}{stride}"


# All but the first, of three channels; strides are those of the 3x3 convolution (v1.5).
RESNET50 = (
    Layer(64, 64, 1, 1, 2, 1), Layer(256, 64, 1, 1, 2, 2), Layer(64, 64, 3, 1, 2, 3), Layer(64, 256, 1, 1, 2, 4),
    Layer(256, 128, 1, 1, 2, 1), Layer(128, 128, 3, 2, 2, 1), Layer(256, 512, 1, 2, 2, 1),
    Layer(512, 128, 1, 1, 3, 3), Layer(128, 128, 3, 1, 3, 3), Layer(128, 512, 1, 1, 3, 4),
    Layer(512, 256, 1, 1, 3, 1), Layer(256, 256, 3, 2, 3, 1), Layer(512, 1024, 1, 2, 3, 1),
    Layer(1024, 256, 1, 1, 4, 5), Layer(256, 256, 3, 1, 4, 5), Layer(256, 1024, 1, 1, 4, 6),
    Layer(1024, 512, 1, 1, 4, 1), Layer(512, 512, 3, 2, 4, 1), Layer(1024, 2048, 1, 2, 4, 1),
    Layer(2048, 512, 1, 1, 5, 2), Layer(512, 512, 3, 1, 5, 2), Layer(512, 2048, 1, 1, 5, 3),
)  # fmt: skip
# Tiles that `search` tries.
CHOICES = [
    {"tile": tile, "step": step, "warps": warps, "stages": stages}
    for tile, step, warps, stages in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))
]
# Off by more than this, as a share of the norm, a result is wrong.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass
class Row:
    """One layer measured; times in microseconds."""

    part: str
    layer: str
    kernel: int
    count: int
    block: str
    sparsity: float
    masks: str
    density: float
    dense: float
    sparse: float
    limit: float

    @property
    def speedup(self) -> float:
        """Speed over cuDNN."""
        return self.dense / self.sparse


def make(layer: Layer, block: str, sparsity: float, place: dict[str, Any]) -> BlockSparseConv2d | None:
    """The sparse layer with a random mask; `None` where blocks are too few or too large for the sparsity."""
    shape = BlockShape.parse(block)
    if layer.inputs < shape.cols or layer.outputs < shape.rows:
        return None
    rows, cols = shape.grid((layer.outputs, layer.inputs))
    for count in (1, layer.kernel**2):
        total = count * rows * cols
        kept = round((1 - sparsity) * total)
        if kept and abs(kept / total - (1 - sparsity)) <= 0.06:
            keep = torch.randperm(total).view(count, rows, cols) < kept
            return BlockSparseConv2d(
                layer.inputs, layer.outputs, layer.kernel, shape, keep, layer.stride, layer.kernel // 2,
                bias=False, per_position=count > 1, **place,
            )  # fmt: skip
    return None


def images(layer: Layer, options: argparse.Namespace, place: dict[str, Any]) -> Tensor:
    """Random channels-last inputs."""
    side = options.image // 2**layer.shrink
    x = torch.randn(options.batch, layer.inputs, side, side, **place)
    return x.to(memory_format=torch.channels_last)


def channels_last(layer: nn.Module) -> nn.Module:
    """The layer with its weight in channels-last memory."""
    weight = layer.get_parameter("weight")
    weight.data = weight.data.to(memory_format=torch.channels_last)
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward pass and both gradients."""

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    return run


def check(sparse: BlockSparseConv2d, x: Tensor, training: bool) -> None:
    """Leaves if output or gradients differ from the dense layer's in float32."""
    exact = channels_last(sparse.to_conv().float())
    wide = x.detach().float().requires_grad_(training)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with torch.set_grad_enabled(training):
            wanted, found = exact(wide), sparse(x)
        pairs = [("output", found, wanted)]
        if training:
            dy = torch.randn_like(found)
            dx, dw = torch.autograd.grad(found, [x, sparse.weight], dy)
            exact_dx, exact_dw = torch.autograd.grad(
                wanted, [wide, exact.get_parameter("weight")], dy.float()
            )
            keep = sparse.layout.stored(sparse.masks)
            pairs += [("input gradient", dx, exact_dx)]
            pairs += [("weight gradient", dw, sparse.layout.pack(exact_dw, keep, sparse.block_shape))]
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    for what, actual, expected in pairs:
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        if not error < TOLERANCE[x.dtype]:
            sys.exit(
                f"error: {what} of {sparse} is off by {error:.2g} from the dense layer's; nothing is reported"
            )


def limit(sparse: BlockSparseConv2d, x: Tensor, y: Tensor, limits: Limits, training: bool) -> float:
    """The least time of the sparse layer, in microseconds: its arithmetic or its tensors once, whichever is more."""
    flops = 2 * (y.numel() // y.shape[1]) * sparse.weight.numel()
    moved = x.nbytes + y.nbytes + sparse.weight.nbytes
    # The backward pass has two products more; it reads x, dy and the weight, and writes dx and dW.
    seconds = limits.seconds(flops, moved) + (limits.seconds(2 * flops, 2 * moved) if training else 0.0)
    return seconds * 1e6


def measured(
    part: str, layer: Layer, block: str, sparsity: float, options: Any, limits: Limits
) -> Row | None:
    """One row; `None` where the layer stays dense."""
    device, training = torch.device(options.device), part == "training"
    place: dict[str, Any] = {"device": device, "dtype": getattr(torch, options.dtype)}
    sparse = make(layer, block, sparsity, place)
    if sparse is None:
        return None
    x = images(layer, options, place).requires_grad_(training)
    check(sparse, x, training)
    sizes = layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2
    dense = channels_last(nn.Conv2d(*sizes, bias=False, **place))
    y = dense(x).detach()
    calls: dict[str, Callable[[], object]] = {"dense": lambda: dense(x), "sparse": lambda: sparse(x)}
    if training:
        dy = torch.randn_like(y)
        calls = {"dense": step(dense, x, dy), "sparse": step(sparse, x, dy)}
    times = {name: 1e6 * value for name, value in race(calls, device, options.repeats).seconds.items()}
    masks = "each" if sparse.layout.per_position else "shared"
    least = limit(sparse, x, y, limits, training)
    return Row(
        part, layer.name, layer.kernel, layer.count, block, sparsity, masks, sparse.density,
        times["dense"], times["sparse"], times["dense"] / least,
    )  # fmt: skip


def products(sparse: BlockSparseConv2d, x: Tensor) -> dict[str, Callable[..., Tensor]]:
    """The three kernels of a layer on its input, to be called with other tiles."""
    from sparsify.kernels.convolution import triton_conv

    weight, topo, sizes = sparse.weight.detach(), sparse.topology("weight"), sparse.geometry
    dy = torch.randn_like(triton_conv.conv(x, weight, None, topo, sizes))
    return {
        "conv": lambda **o: triton_conv.conv(x, weight, None, topo, sizes, **o),
        "conv_dx": lambda **o: triton_conv.conv_dx(dy, weight, topo, sizes, *x.shape[1:3], **o),
        "conv_dw": lambda **o: triton_conv.conv_dw(dy, x, topo, sizes, *weight.shape[1:], **o),
    }


def choice_time(product: Callable[..., Tensor], chosen: dict[str, Any], device: torch.device) -> float:
    """Microseconds of a kernel with chosen tiles; infinite where it cannot be compiled or launched.

    Raises:
        ValueError: If its result is not that of the default tiles.
    """
    wanted = product().float()
    try:
        actual = product(**chosen).float()
        seconds = race({"": lambda: product(**chosen)}, device, 5).seconds[""]
    except (RuntimeError, ValueError, AssertionError, LookupError, TypeError):
        return math.inf
    except Exception as error:  # Triton's own, such as too much shared memory
        if not type(error).__module__.startswith("triton"):
            raise
        return math.inf
    if not (actual - wanted).norm() <= 1e-2 * wanted.norm():
        raise ValueError(f"wrong with {chosen}")
    return seconds * 1e6


def search(layers: Sequence[Layer], block: str, sparsity: float, options: argparse.Namespace) -> list[dict]:
    """Times of the 3x3 kernels with other tiles, fastest first, for each layer and product."""
    device = torch.device(options.device)
    place: dict[str, Any] = {"device": device, "dtype": getattr(torch, options.dtype)}
    found = []
    for layer in layers:
        sparse = make(layer, block, sparsity, place) if layer.kernel > 1 else None
        if sparse is None:
            continue
        x = images(layer, options, place).movedim(1, -1)
        for name, product in products(sparse, x).items():
            default = choice_time(product, {}, device)
            times = [(choice_time(product, chosen, device), chosen) for chosen in CHOICES]
            best = sorted(times, key=lambda item: item[0])[:5]
            found.append(
                {
                    "layer": layer.name,
                    "block": block,
                    "sparsity": sparsity,
                    "product": name,
                    "default": default,
                }
                | {"best": [{"us": time} | chosen for time, chosen in best]}
            )
            print(
                f"{layer.name} {name}: default {default:.1f} us, best {best[0][0]:.1f} us with {best[0][1]}"
            )
    return found


def mean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each kind of kernel, block and sparsity: speed-ups, and that of all such layers of the network together."""
    found = []
    keys = dict.fromkeys((row.part, row.kernel, row.block, row.sparsity) for row in rows)
    for key in keys:
        own = [row for row in rows if (row.part, row.kernel, row.block, row.sparsity) == key]
        dense, sparse = (sum(r.count * getattr(r, name) for r in own) for name in ("dense", "sparse"))
        auto = sum(row.count * min(row.dense, row.sparse) for row in own)
        found.append(
            dict(zip(("part", "kernel", "block", "sparsity"), key, strict=True))
            | {
                "layers": len(own),
                "lowest": min(row.speedup for row in own),
                "mean": mean([row.speedup for row in own]),
                "highest": max(row.speedup for row in own),
                "together": dense / sparse,
                "auto": dense / auto,
                "limit": mean([row.limit for row in own]),
                "slower": sum(row.speedup < 1 for row in own),
            }
        )
    return found


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    environment = record["environment"]
    gpu = ", ".join(environment.get("gpu") or []) or environment.get("cpu", "CPU")
    lines = [
        "# Convolutions: block-sparse layers against cuDNN\n",
        f"`{record['command']}`\n",
        f"{gpu}, torch {torch.__version__}, {record['dtype']}, channels-last, cuDNN in benchmark mode, batch "
        f"{record['batch']} of {record['image']} x {record['image']} pictures through ResNet-50 (dense product "
        f"{record['limits']['flops'] / 1e12:.0f} TFLOP/s, copy {record['limits']['bytes'] / 1e12:.2f} TB/s). Speed-ups "
        "over dense in the same run. *Together* weighs each layer by its time and by how often the network has it; "
        "*auto* leaves dense what is slower sparse; the *limit* is what kept arithmetic, or images read and written "
        "once, would allow at those speeds.\n",
        "| part | kernel | block | sparsity | layers | lowest | mean | highest | together | auto | limit | slower |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["summary"]:
        numbers = " | ".join(
            f"{row[key]:.2f}" for key in ("lowest", "mean", "highest", "together", "auto", "limit")
        )
        lines.append(
            f"| {row['part']} | {row['kernel']}x{row['kernel']} | {row['block']} | {row['sparsity']:.0%} | "
            f"{row['layers']} | {numbers} | {row['slower']} |"
        )
    lines += [
        "\n| part | layer | in ResNet-50 | block | sparsity | masks | dense us | sparse us | speed-up | limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['part']} | {row['layer']} | {row['count']} | {row['block']} | {row['sparsity']:.0%} | "
        f"{row['masks']} | {row['dense']:.1f} | {row['sparse']:.1f} | **{row['speedup']:.2f}** | {row['limit']:.2f} |"
        for row in record["rows"]
    ]
    if record["left_dense"]:
        lines.append(f"\nToo few blocks for the sparsity, left out: {'; '.join(record['left_dense'])}.")
    return "\n".join(lines) + "\n"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for JSON and Markdown")
    parser.add_argument("--part", default="forward,training", help="forward, training, search")
    parser.add_argument("--blocks", default="64x64,128x128")
    parser.add_argument("--sparsities", default="0.5,0.75,0.9")
    parser.add_argument("--layers", default="", help="a regular expression of the layers' names, such as 3x3")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    options = arguments(given)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    limits = machine_limits(torch.device(options.device), getattr(torch, options.dtype))
    layers = [layer for layer in RESNET50 if re.search(options.layers, layer.name)]
    blocks, sparsities = options.blocks.split(","), [float(share) for share in options.sparsities.split(",")]
    record: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "environment": measure.environment(),
        "dtype": options.dtype,
        "batch": options.batch,
        "image": options.image,
        "repeats": options.repeats,
        "limits": asdict(limits),
        "summary": [],
        "rows": [],
        "left_dense": [],
        "search": [],
    }
    rows: list[Row] = []
    for part in options.part.split(","):
        for block, sparsity in itertools.product(blocks, sparsities):
            if part == "search":
                record["search"] += search(layers, block, sparsity, options)
                write(record, rows, options.out)
                continue
            for layer in layers:
                row = measured(part, layer, block, sparsity, options, limits)
                if row is None:
                    left = f"{layer.name} in {block} at {sparsity:.0%}"
                    record["left_dense"] += [left] if left not in record["left_dense"] else []
                    continue
                rows.append(row)
                print(
                    f"{part} {layer.name:24} {block:>7} {sparsity:.0%} {row.masks:6} dense {row.dense:8.1f} us, sparse "
                    f"{row.sparse:8.1f} us: {row.speedup:.2f}x (limit {row.limit:.2f}x)",
                    flush=True,
                )
                write(record, rows, options.out)
    write(record, rows, options.out)
    for row in record["summary"]:
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})


def write(record: dict[str, Any], rows: Sequence[Row], out: Path | None) -> None:
    """Takes the rows so far into the record, and writes it as JSON and Markdown."""
    record |= {"summary": summary(rows), "rows": [asdict(row) | {"speedup": row.speedup} for row in rows]}
    if out is not None:
        write_pages(out, "convolutions", record, table(record))


if __name__ == "__main__":
    main()
