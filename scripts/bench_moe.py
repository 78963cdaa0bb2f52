"""Mixture-of-experts layers, block-sparse against dense grouped products: prefill and decoding, by block and sparsity.

Prerequisite: a CUDA GPU, transformers, and this package installed or on the path. The command behind docs/benchmarks:

    python scripts/bench_moe.py --out docs/benchmarks

Layers are transformers' own experts at the sizes of Qwen3-30B-A3B and Mixtral-8x7B, random weights (zeros would draw
less power), random routing without repeats, the same for all. Dense is the fastest of transformers' implementations
that a CUDA graph can hold: `grouped_mm` (`torch.nn.functional.grouped_mm`), and `batched_mm` where there are few
tokens; sparse is the whole `BlockSparseExperts` call. Correctness comes first: an output that is off from the masked
dense experts' in float32 is an error, not a number. Times are medians of single calls replayed as CUDA graphs,
contestants in turns, the L2 cache flushed before each. The *limit* is the speed-up that a layer could have if it took
no longer than its kept arithmetic, or the weights of the experts that are hit, tokens and results once, whichever is
more, at the speeds of a dense product and of a copy here.

`--part training` times forward and backward pass of the prefill; `--part search` times other tile sizes of the two
products, to choose their defaults by.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench_conv import choice_time
from bench_rows import write_pages
from sparsify import BlockMask, BlockShape, BlockSparseExperts, measure
from sparsify.bench.limits import Limits, machine_limits
from sparsify.bench.timing import race

# Off by more than this, as a share of the norm, an output is wrong.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-4}
# Dense weights that `batched_mm` may gather, a copy for each slot, in bytes.
MOST_GATHERED = 16 << 30


@dataclass(frozen=True)
class Layer:
    """Sizes of a mixture-of-experts layer.

    Attributes:
        name: The model's.
        experts: Experts, `E`.
        top: Experts of a token.
        hidden: Input and output features, `H`.
        inner: Features between the projections, `I`.
    """

    name: str
    experts: int
    top: int
    hidden: int
    inner: int


LAYERS = {
    "qwen3": Layer("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "mixtral": Layer("Mixtral-8x7B", 8, 2, 4096, 14336),
    "tiny": Layer("tiny", 8, 2, 128, 192),  # to try the script
}
# Tiles that `search` tries.
PREFILL = [
    {"tile": tile, "step": step, "warps": warps, "stages": stages}
    for tile, step, warps, stages in itertools.product((64, 128, 256), (64, 128), (4, 8), (4, 5, 6))
] + [{"kernel": "hopper_grouped", "tile": tile} for tile in (128, 256)]
DECODE = [
    {"tile": tile, "part": part, "step": step, "stages": stages}
    for tile, part, step, stages in itertools.product((1, 16), (16, 32, 64), (64, 128, 256, 512), (3, 5))
]


@dataclass
class Row:
    """One layer measured; times in microseconds."""

    part: str
    layer: str
    tokens: int
    hit: int
    block: str
    sparsity: float
    implementation: str
    dense: float
    sparse: float
    limit: float

    @property
    def speedup(self) -> float:
        """Speed over the fastest dense implementation."""
        return self.dense / self.sparse


def dense_experts(layer: Layer, place: dict[str, Any]) -> nn.Module:
    """transformers' experts with random weights."""
    if layer.top > 2:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=layer.hidden, moe_intermediate_size=layer.inner, num_experts=layer.experts
        )
        kind = Qwen3MoeExperts
    else:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=layer.hidden, intermediate_size=layer.inner, num_local_experts=layer.experts
        )
        kind = MixtralExperts
    with torch.device("meta"):
        module = kind(config)
    module = module.to_empty(device=place["device"]).to(place["dtype"]).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return module


def sparse_experts(dense: nn.Module, block: str, sparsity: float) -> BlockSparseExperts:
    """The block-sparse equivalent, with random masks of exactly the sparsity."""
    shape = BlockShape.parse(block)
    sparse = BlockSparseExperts(dense)
    for name in ("gate_up_proj", "down_proj"):
        weight = dense.get_parameter(name)
        count, size = weight.shape[0], (weight.shape[1], weight.shape[2])
        rows, cols = shape.grid(size)
        kept = round((1 - sparsity) * rows * cols)
        keep = (torch.randperm(rows * cols).view(rows, cols) < kept for _ in range(count))
        sparse.pack_weight(name, weight, [BlockMask(own, size, shape) for own in keep])
    return sparse


def routing(layer: Layer, tokens: int, place: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and for each token the experts that it is sent to with their weights."""
    hidden = torch.randn(tokens, layer.hidden, **place)
    index = torch.rand(tokens, layer.experts, device=place["device"]).topk(layer.top).indices
    weights = torch.softmax(torch.randn(tokens, layer.top, **place), -1)
    return hidden, index, weights


def implementation(dense: nn.Module, name: str) -> Callable[..., Tensor]:
    """The dense layer computed by one of transformers' implementations."""

    def run(*inputs: Tensor) -> Tensor:
        dense.config._experts_implementation = name  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
        return dense(*inputs)

    return run


def check(sparse: BlockSparseExperts, dense: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Leaves if the output differs from the masked dense experts' in float32."""
    hidden, index, weights = inputs
    found = sparse(*inputs).float()
    wanted = torch.zeros_like(found)
    for expert in range(sparse.num_experts):
        token, place = (index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        first, second = (sparse.dense_of(name, expert).float() for name in ("gate_up_proj", "down_proj"))
        gate, up = (hidden[token].float() @ first.T).chunk(2, -1)
        inner = dense.act_fn(gate) * up  # pyright: ignore[reportCallIssue]
        wanted.index_add_(0, token, inner @ second.T * weights[token, place, None].float())
    error = (found - wanted).norm() / wanted.norm()
    if not error < TOLERANCE[hidden.dtype]:
        sys.exit(
            f"error: the output of {sparse} is off by {error:.2g} from the dense experts'; nothing is reported"
        )


def limit(sparse: BlockSparseExperts, inputs: tuple[Tensor, ...], limits: Limits, training: bool) -> float:
    """The least time of the sparse layer in microseconds: arithmetic or bytes, whichever is more."""
    hidden, index, _ = inputs
    counts = torch.bincount(index.flatten(), minlength=sparse.num_experts).tolist()
    flops, moved = 0.0, 2.0 * hidden.nbytes
    for name in sparse.packed:
        weight = sparse.get_parameter(name)
        for expert, count in enumerate(counts):
            own = sparse.block_range(name, expert)
            elements = (own.stop - own.start) * weight[0].numel()
            flops += 2 * count * elements
            moved += weight.element_size() * elements * (count > 0)
    seconds = limits.seconds(flops, moved) + (limits.seconds(2 * flops, 2 * moved) if training else 0.0)
    return seconds * 1e6


def step(run: Callable[..., Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward pass and gradients of input and weights."""
    hidden, index, weights = inputs
    hidden = hidden.detach().requires_grad_()
    upstream, leaves = torch.randn_like(hidden), [hidden, *module.parameters()]

    def call() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(run(hidden, index, weights), leaves, upstream)

    return call


def measured(
    part: str,
    layer: Layer,
    dense: nn.Module,
    sparse: BlockSparseExperts,
    tokens: int,
    options: Any,
    limits: Limits,
) -> tuple[str, float, float, float, int]:
    """Fastest dense implementation, its time, the sparse layer's, the least time, and how many experts are hit."""
    device = torch.device(options.device)
    place: dict[str, Any] = {"device": device, "dtype": getattr(torch, options.dtype)}
    inputs, training = routing(layer, tokens, place), part == "training"
    with torch.no_grad():
        check(sparse, dense, inputs)
    names = ["grouped_mm"]
    per_slot = sum(weight.nbytes for weight in dense.parameters()) / layer.experts
    if not training and tokens * layer.top * per_slot <= MOST_GATHERED and tokens <= 64:
        names.append("batched_mm")
    runs: dict[str, Callable[..., Tensor]] = {name: implementation(dense, name) for name in names}
    runs["sparse"] = sparse
    if training:
        modules = {name: sparse if name == "sparse" else dense for name in runs}
        calls = {name: step(run, modules[name], inputs) for name, run in runs.items()}
    else:
        calls = {name: lambda run=run: run(*inputs) for name, run in runs.items()}
    times = {name: 1e6 * value for name, value in race(calls, device, options.repeats).seconds.items()}
    best = min(names, key=lambda name: times[name])
    hit = int(inputs[1].unique().numel())
    return best, times[best], times["sparse"], limit(sparse, inputs, limits, training), hit


def search(layer: Layer, sparse: BlockSparseExperts, block: str, tokens: int, options: Any) -> list[dict]:
    """Times of both products with other tiles, the fastest five."""
    from sparsify.kernels.grouped.ops import group_by_expert

    device = torch.device(options.device)
    hidden, index, weights = routing(
        layer, tokens, {"device": device, "dtype": getattr(torch, options.dtype)}
    )
    groups, scale = group_by_expert(index.flatten(), layer.experts), weights.flatten()
    first, second = (sparse.get_parameter(name).detach() for name in ("gate_up_proj", "down_proj"))
    first_topo, second_topo = (sparse.stacked_topology(name) for name in ("gate_up_proj", "down_proj"))

    def up(kernel: str = "triton_grouped", **chosen: Any) -> Tensor:
        return import_module(f"sparsify.kernels.grouped.{kernel}").grouped(
            hidden, first, None, first_topo, groups, 2 * layer.inner, "silu", None, True, **chosen
        )

    inner = up()

    def down(kernel: str = "triton_grouped", **chosen: Any) -> Tensor:
        return import_module(f"sparsify.kernels.grouped.{kernel}").grouped(
            inner, second, None, second_topo, groups, layer.hidden, "", scale, **chosen
        )

    found = []
    for name, product in (("up", up), ("down", down)):
        default = choice_time(product, {}, device)
        choices = PREFILL if tokens > 64 else DECODE
        times = [(choice_time(product, chosen, device), chosen) for chosen in choices]
        best = sorted(times, key=lambda item: item[0])[:5]
        found.append(
            {"layer": layer.name, "block": block, "tokens": tokens, "product": name, "default": default}
            | {"best": [{"us": time} | chosen for time, chosen in best]}
        )
        print(
            f"{layer.name} {block} {tokens} tokens, {name}: default {default:.1f} us, best {best[0][0]:.1f} us with "
            f"{best[0][1]}",
            flush=True,
        )
    return found


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    environment = record["environment"]
    gpu = ", ".join(environment.get("gpu") or []) or environment.get("cpu", "CPU")
    lines = [
        "# Mixture of experts: block-sparse layers against dense grouped products\n",
        f"`{record['command']}`\n",
        f"{gpu}, torch {torch.__version__}, {record['dtype']}; times of the experts' whole forward pass, routing "
        f"excluded, as CUDA graphs (dense product {record['limits']['flops'] / 1e12:.0f} TFLOP/s, copy "
        f"{record['limits']['bytes'] / 1e12:.2f} TB/s). *Dense* is the fastest of transformers' implementations; *hit* "
        "are the experts that any token is sent to; the *limit* is what kept arithmetic, or the hit experts' weights "
        "read once, would allow at those speeds.\n",
        "| part | layer | tokens | hit | block | sparsity | dense | dense us | sparse us | speed-up | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['part']} | {row['layer']} | {row['tokens']} | {row['hit']} | {row['block']} | {row['sparsity']:.0%} | "
        f"{row['implementation']} | {row['dense']:.1f} | {row['sparse']:.1f} | **{row['speedup']:.2f}** | "
        f"{row['limit']:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines) + "\n"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for JSON and Markdown")
    parser.add_argument("--part", default="decode,prefill", help="decode, prefill, training, search")
    parser.add_argument("--layers", default="qwen3,mixtral", help=", ".join(LAYERS))
    parser.add_argument("--blocks", default="64x64,128x128")
    parser.add_argument("--sparsities", default="0.5,0.75,0.9")
    parser.add_argument("--prefill", default="4096", help="tokens of a prefill and of a training step")
    parser.add_argument("--decode", default="1,4,16", help="tokens of a decoding step: its batch")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    options = arguments(given)
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": torch.device(options.device), "dtype": getattr(torch, options.dtype)}
    limits = machine_limits(place["device"], place["dtype"])
    decode, prefill = ([int(n) for n in text.split(",") if n] for text in (options.decode, options.prefill))
    counts = {"decode": decode, "prefill": prefill, "training": prefill, "search": [*decode, *prefill]}
    sparsities = [float(share) for share in options.sparsities.split(",")]
    record: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "environment": measure.environment(),
        "dtype": options.dtype,
        "repeats": options.repeats,
        "limits": asdict(limits),
        "rows": [],
        "search": [],
    }
    for key in options.layers.split(","):
        layer = LAYERS[key]
        dense = dense_experts(layer, place)
        for block, sparsity in itertools.product(options.blocks.split(","), sparsities):
            sparse = sparse_experts(dense, block, sparsity)
            for part in options.part.split(","):
                for tokens in counts[part]:
                    if part == "search":
                        record["search"] += search(layer, sparse, block, tokens, options)
                        write(record, options.out)
                        continue
                    best, slow, fast, least, hit = measured(
                        part, layer, dense, sparse, tokens, options, limits
                    )
                    row = Row(part, layer.name, tokens, hit, block, sparsity, best, slow, fast, slow / least)
                    record["rows"].append(asdict(row) | {"speedup": row.speedup})
                    print(
                        f"{part:8} {layer.name:14} {tokens:5} tokens, {hit:3} experts, {block:>7} {sparsity:.0%} "
                        f"{best} {slow:8.1f} us, sparse {fast:8.1f} us: {row.speedup:.2f}x (limit {row.limit:.2f}x)",
                        flush=True,
                    )
                    write(record, options.out)
            del sparse
        del dense


def write(record: dict[str, Any], out: Path | None) -> None:
    """Writes what there is so far, as JSON and Markdown."""
    if out is not None:
        write_pages(out, "experts", record, table(record))


if __name__ == "__main__":
    main()
