"""Block-sparse layers against dense cuBLAS, torch's BSR and the limit of the GPU, by shape, block and sparsity.

Prerequisite: a CUDA GPU, and this package installed or on the path. The command behind docs/benchmarks:

    python scripts/bench_kernels.py --out docs/benchmarks

`--only prefill,decode` picks parts; `--repeats 5` is quicker. Every figure is the GPU's time
for a whole `BlockSparseLinear` call, replayed as a CUDA graph: transposition and packing included, with the work lists
made by the warm-up call, as in use. What the host needs to issue a call is given apart.
Correctness against float64 comes first: a product that is off is an error, not a number. Weights and activations are
random, masks uniformly random, the dense weight is not masked (zeros draw less power and run faster). Times are
medians of single calls (bursts), all contestants interleaved, the L2 cache flushed before each; *held* is the
speed-up when each call is repeated for a second. Decoding replays CUDA graphs over several copies of the weight that
together exceed the L2 cache; our kernels begin to read their weights before the layer in front is done, as they do in
any model whose weights nobody writes to. *skewed* masks keep between nothing and everything of a block row, by a power
law. *changing* calls have another number of tokens each time and are issued without CUDA graphs.

The limit is the larger of kept FLOPs over the dense rate and kept bytes over the copy rate, both measured in the run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from sparsify import BlockMask, BlockShape, BlockSparseLinear, measure

LLAMA_8B = (14336, 4096)
SHAPES = {
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-8B q, o": (4096, 4096),
    "Llama-3-8B k, v": (1024, 4096),
    "Llama-3.2-1B up": (8192, 2048),
    "Llama-3.2-1B down": (2048, 8192),
    "ViT-H up": (5120, 1280),
    "ViT-H down": (1280, 5120),
    "BERT up": (3072, 768),
    "BERT down": (768, 3072),
}
SQUARE = ("128x128", "64x64", "32x32", "16x16")
TALL = ("256x16", "128x16", "128x32")
DTYPE = torch.bfloat16


@dataclass
class Row:
    """One measurement; times in microseconds, `None` where a contestant does not run."""

    part: str
    shape: tuple[int, int]
    block: str
    sparsity: float
    tokens: int
    dense: float
    ours: float
    limit: float
    bsr: float | None = None
    sustained: float | None = None

    @property
    def speedup(self) -> float:
        """Dense time over ours."""
        return self.dense / self.ours


class Bench:
    """Timers, the GPU's measured rates, and the rows so far."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        big = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        other = torch.empty_like(big)
        self.copy_rate = (
            2 * big.numel() / self.interleaved({"copy": lambda: other.copy_(big)})["copy"]
        )  # bytes/us
        a = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
        self.dense_rate = 2 * 8192**3 / self.interleaved({"mm": lambda: a @ a})["mm"]  # FLOP/us
        self.rows: list[Row] = []
        self.host_times: dict[str, float] = {}
        self.memory: dict[str, float] = {}

    @staticmethod
    def captured(call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph, so that its time is the GPU's alone; the call itself if it cannot be captured."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            return call
        return graph.replay

    @staticmethod
    def host(call: Callable[[], object], calls: int = 300) -> float:
        """Microseconds that the host needs to issue one call."""
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        issued = time.perf_counter() - begin
        torch.cuda.synchronize()
        return issued / calls * 1e6

    def interleaved(self, contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median microseconds of each call, taken in turns."""
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for call in contestants.values():
            call()
            call()
        for _ in range(self.repeats):
            for name, call in contestants.items():
                self.flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 1e3)
        return {name: statistics.median(values) for name, values in times.items()}

    def sustained(self, call: Callable[[], object], seconds: float = 1.0) -> float:
        """Mean microseconds of a call that is repeated until power and clocks have settled."""
        end_at = time.perf_counter() + seconds
        while time.perf_counter() < end_at:
            for _ in range(50):
                call()
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(200):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / 200

    def limit(self, kept: int, tokens: int, shape: tuple[int, int], products: int = 1) -> float:
        """Microseconds that no kernel on this GPU can undercut, for `kept` stored elements."""
        flops = 2 * kept * tokens / self.dense_rate
        moved = 2 * (kept + tokens * sum(shape)) / (self.copy_rate)
        return products * max(flops, moved)

    def add(self, row: Row) -> None:
        """Keeps and prints a row."""
        self.rows.append(row)
        bsr = "" if row.bsr is None else f"  torch BSR {row.dense / row.bsr:5.2f}x"
        held = "" if row.sustained is None else f"  sustained {row.sustained:5.2f}x"
        print(
            f"{row.part:9} {row.shape[0]:>5}x{row.shape[1]:<5} {row.block:>7} {row.sparsity:4.0%} M={row.tokens:<5} "
            f"dense {row.dense:7.1f} us  ours {row.ours:7.1f} us  {row.speedup:5.2f}x  "
            f"limit {row.dense / row.limit:5.2f}x{bsr}{held}",
            flush=True,
        )


def make(
    shape: tuple[int, int], block: str, sparsity: float, skewed: bool = False
) -> tuple[nn.Linear, BlockSparseLinear]:
    """A random dense layer and its block-sparse twin under a random mask.

    Uniformly random, or skewed: block rows keep shares between nothing and everything, by a power law.
    """
    size = BlockShape.parse(block)
    dense = nn.Linear(shape[1], shape[0], bias=False, device="cuda", dtype=DTYPE)
    grid = size.grid(shape)
    keep = torch.full((grid[0], 1), 1 - sparsity)
    if skewed:
        rank = torch.randperm(grid[0])[:, None] / grid[0]
        keep = rank ** (sparsity / (1 - sparsity))  # its mean is 1 - sparsity
    mask = BlockMask(torch.rand(grid) < keep, shape, size)
    return dense, BlockSparseLinear.from_linear(dense, mask)


def check(sparse: BlockSparseLinear, x: torch.Tensor) -> None:
    """Stops the program if the layer's output is not that of float64."""
    poison = torch.full((x.shape[0], sparse.out_features), float("nan"), device="cuda", dtype=DTYPE)
    del poison  # its memory becomes the output's: what is not written stays NaN
    actual = sparse(x).double()
    exact = x.double() @ sparse.dense_weight().double().T
    error = ((actual - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    if not error < 5e-3:
        sys.exit(
            f"error: {sparse} at {x.shape[0]} tokens is off by {error:.2g} from float64; nothing is reported"
        )


def prefill(
    bench: Bench, part: str, shape: tuple[int, int], block: str, sparsity: float, tokens: int, full: bool
) -> None:
    """One forward of many tokens."""
    dense, sparse = make(shape, block, sparsity, part == "skewed")
    x = torch.randn(tokens, shape[1], device="cuda", dtype=DTYPE)
    check(sparse, x)
    contestants = {"dense": bench.captured(lambda: dense(x)), "ours": bench.captured(lambda: sparse(x))}
    if full:
        try:
            bsr = sparse.dense_weight().to_sparse_bsr((sparse.block_shape.rows, sparse.block_shape.cols))
            nn.functional.linear(x, bsr)
            contestants["bsr"] = bench.captured(lambda: nn.functional.linear(x, bsr))
        except RuntimeError:
            pass  # torch has no kernel for this block shape
    times = bench.interleaved(contestants)
    held = None
    if full and sparsity == 0.75:
        held = bench.sustained(contestants["dense"]) / bench.sustained(contestants["ours"])
    limit = bench.limit(sparse.weight.numel(), tokens, shape)
    bench.add(
        Row(
            part, shape, block, sparsity, tokens, times["dense"], times["ours"], limit, times.get("bsr"), held
        )
    )


def changing(bench: Bench, shape: tuple[int, int], block: str, sparsity: float) -> None:
    """Calls with another number of tokens each time, issued one after the other without CUDA graphs.

    Times are those of one call on the average, the host's included where it is the slower one; `tokens` is the mean.
    """
    dense, sparse = make(shape, block, sparsity)
    counts = (4096, 1000, 77, 2048, 300, 513, 3000, 128)
    inputs = [torch.randn(count, shape[1], device="cuda", dtype=DTYPE) for count in counts]
    for x in inputs:
        check(sparse, x)

    def turn(layer: nn.Module) -> Callable[[], object]:
        return lambda: [layer(x) for x in inputs]

    times = bench.interleaved({"dense": turn(dense), "ours": turn(sparse)})
    mean = sum(counts) // len(counts)
    limit = bench.limit(sparse.weight.numel(), mean, shape)
    bench.add(
        Row(
            "changing",
            shape,
            block,
            sparsity,
            mean,
            times["dense"] / len(counts),
            times["ours"] / len(counts),
            limit,
        )
    )


def memory(bench: Bench, shape: tuple[int, int], block: str, sparsity: float) -> None:
    """GPU memory of weight, gradient and AdamW's state after a step, over the dense layer's."""
    taken = []
    for layer in make(shape, block, sparsity):
        weight = next(p for p in layer.parameters() if p.dim() > 1)
        x = torch.randn(16, shape[1], device="cuda", dtype=DTYPE)
        optimizer = torch.optim.AdamW([weight])
        layer(x).sum().backward()
        optimizer.step()
        held = [weight, weight.grad, *optimizer.state[weight].values()]
        taken.append(sum(tensor.nbytes for tensor in held if tensor is not None))
    bench.memory[f"{shape[0]}x{shape[1]} {block} {sparsity:.0%}"] = round(taken[1] / taken[0], 4)


def decode(
    bench: Bench, shape: tuple[int, int], block: str, sparsity: float, tokens: int, skewed: bool = False
) -> None:
    """A few tokens at a time, in a CUDA graph."""
    dense, sparse = make(shape, block, sparsity, skewed)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=DTYPE)
    check(sparse, x)

    def replayed(layer: nn.Module) -> float:
        count = 2 + (240 << 20) // (2 * sum(p.numel() for p in layer.parameters()))
        copies = [copy.deepcopy(layer) for _ in range(min(24, count))]
        for twin in copies:
            twin(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for twin in copies:
                twin(x)
        return bench.interleaved({"graph": graph.replay})["graph"] / len(copies)

    limit = bench.limit(sparse.weight.numel(), tokens, shape)
    part = "skewed" if skewed else "decode"
    bench.add(Row(part, shape, block, sparsity, tokens, replayed(dense), replayed(sparse), limit))


def training(bench: Bench, shape: tuple[int, int], block: str, sparsity: float, tokens: int) -> None:
    """Forward, input gradient and weight gradient."""
    dense, sparse = make(shape, block, sparsity)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=DTYPE, requires_grad=True)
    dy = torch.randn(tokens, shape[0], device="cuda", dtype=DTYPE)
    check(sparse, x)

    def step(layer: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    dx, dw = step(sparse)()  # pyright: ignore[reportGeneralTypeIssues]
    twin = sparse.to_linear()
    exact_dx, exact_dw = step(twin)()  # pyright: ignore[reportGeneralTypeIssues]
    exact_dw = BlockSparseLinear.from_dense(exact_dw, None, sparse.mask).weight
    for name, actual, exact in (("dX", dx, exact_dx), ("dW", dw, exact_dw)):
        if not (actual.float() - exact.float()).norm() < 1e-2 * exact.float().norm():
            sys.exit(f"error: {name} of {sparse} differs from the dense layer's; nothing is reported")
    times = bench.interleaved({"dense": bench.captured(step(dense)), "ours": bench.captured(step(sparse))})
    limit = bench.limit(sparse.weight.numel(), tokens, shape, products=3)
    bench.add(Row("training", shape, block, sparsity, tokens, times["dense"], times["ours"], limit))


def host_times(bench: Bench) -> None:
    """What the host needs to issue one call, layer and all, without CUDA graphs."""
    dense, sparse = make((512, 512), "64x64", 0.5)
    for tokens in (1, 256):
        x = torch.randn(tokens, 512, device="cuda", dtype=DTYPE)
        for name, layer in (("dense", dense), ("ours", sparse)):
            bench.host_times[f"{name}, {tokens} tokens"] = round(
                bench.host(lambda layer=layer, x=x: layer(x)), 1
            )
    print("host us per call:", bench.host_times)


def run(bench: Bench, parts: list[str]) -> None:
    """All measurements of the parts asked for."""
    if "prefill" in parts:
        for block in SQUARE + TALL:
            for sparsity in (0.5, 0.75, 0.9):
                prefill(bench, "prefill", LLAMA_8B, block, sparsity, 4096, full=True)
    if "breakeven" in parts:
        for block in ("128x128", "64x64", "128x16", "32x32"):
            for sparsity in (0.1, 0.2, 0.3, 0.4):
                prefill(bench, "breakeven", LLAMA_8B, block, sparsity, 4096, full=False)
    if "tokens" in parts:
        for block in ("128x128", "64x64", "128x16"):
            for tokens in (33, 64, 256, 512, 1000, 2048, 8192):
                prefill(bench, "tokens", LLAMA_8B, block, 0.75, tokens, full=False)
    if "shapes" in parts:
        for shape in SHAPES.values():
            for block in ("128x128", "64x64"):
                prefill(bench, "shapes", shape, block, 0.75, 4096, full=False)
    if "decode" in parts:
        for shape in (LLAMA_8B, (4096, 14336), (1024, 4096)):
            for block in ("64x64", "128x16"):
                for sparsity in (0.5, 0.75, 0.9):
                    for tokens in (1, 4, 16, 64):
                        decode(bench, shape, block, sparsity, tokens)
    if "skewed" in parts:
        for block in ("128x128", "64x64", "128x16", "32x32"):
            prefill(bench, "skewed", LLAMA_8B, block, 0.75, 4096, full=False)
        for block in ("64x64", "128x16"):
            decode(bench, LLAMA_8B, block, 0.75, 1, skewed=True)
    if "changing" in parts:
        for block in ("128x128", "64x64", "128x16"):
            changing(bench, LLAMA_8B, block, 0.75)
    if "training" in parts:
        for block in ("128x128", "64x64", "128x16", "32x32"):
            for sparsity in (0.75, 0.9):
                training(bench, LLAMA_8B, block, sparsity, 8192)
                memory(bench, LLAMA_8B, block, sparsity)


def write(bench: Bench, out: Path, arguments: argparse.Namespace) -> None:
    """JSON, a Markdown table and a plot, named after the GPU."""
    out.mkdir(parents=True, exist_ok=True)
    name = "kernels-" + torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")
    record = {
        "command": "python " + " ".join(sys.argv),
        "environment": measure.environment(),
        "dense_tflops": bench.dense_rate / 1e6,
        "copy_tb_per_s": bench.copy_rate / 1e6,
        "repeats": arguments.repeats,
        "host_us_per_call": bench.host_times,
        "training_memory_over_dense": bench.memory,
        "rows": [asdict(row) | {"speedup": row.speedup} for row in bench.rows],
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(record))
    plot([row for row in bench.rows if row.part == "prefill"], out / f"{name}.png")
    print(f"written: {out / name}.json, .md, .png")


def table(record: dict) -> str:
    """The record as Markdown."""
    environment = record["environment"]
    lines = [
        "# Kernels: block-sparse layers against dense cuBLAS\n",
        f"`{record['command']}`\n",
        f"{', '.join(environment['gpu'])}, torch {torch.__version__}, bf16, dense {record['dense_tflops']:.0f} "
        f"TFLOP/s, copy {record['copy_tb_per_s']:.1f} TB/s. Speed-ups over dense in the same run; the limit is what "
        "kept FLOPs and bytes would allow at those rates; *held* is the speed-up of calls repeated for a second.\n",
        "Host time to issue a call, microseconds: "
        + "; ".join(f"{name} {value}" for name, value in record["host_us_per_call"].items())
        + ".\n",
        "Memory of weight, gradient and AdamW's state over the dense layer's: "
        + "; ".join(f"{name} {value}" for name, value in record["training_memory_over_dense"].items())
        + ".\n",
        "| part | out x in | block | sparsity | tokens | dense us | ours us | speed-up | limit | torch BSR | held |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        bsr = f"{row['dense'] / row['bsr']:.2f}" if row["bsr"] else "-"
        held = f"{row['sustained']:.2f}" if row["sustained"] else "-"
        lines.append(
            f"| {row['part']} | {row['shape'][0]}x{row['shape'][1]} | {row['block']} | {row['sparsity']:.0%} | "
            f"{row['tokens']} | {row['dense']:.1f} | {row['ours']:.1f} | **{row['speedup']:.2f}** | "
            f"{row['dense'] / row['limit']:.2f} | {bsr} | {held} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up by sparsity, a line a block shape, with break-even."""
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for block in dict.fromkeys(row.block for row in rows):
        own = [row for row in rows if row.block == block]
        axes.plot([row.sparsity * 100 for row in own], [row.speedup for row in own], marker="o", label=block)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="sparsity, %",
        ylabel="speed-up over dense cuBLAS",
        yscale="log",
        yticks=[0.25, 0.5, 1, 2, 4, 8],
    )
    axes.set_yticklabels(["0.25", "0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set_title(f"{rows[0].shape[0]}x{rows[0].shape[1]}, {rows[0].tokens} tokens, bf16")
    axes.legend(title="block, out x in")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = "prefill,breakeven,tokens,shapes,decode,skewed,changing,training"
    parser.add_argument("--only", default=everything, help=f"comma-separated parts (default: {everything})")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each contestant")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks"), help="folder for JSON, table and plot"
    )
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(everything.split(",")):
        parser.error(f"unknown part {min(unknown)!r}: choose from {everything}")
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here; this benchmark measures GPU kernels")
    torch.manual_seed(0)
    bench = Bench(arguments.repeats)
    print(f"dense {bench.dense_rate / 1e6:.0f} TFLOP/s, copy {bench.copy_rate / 1e6:.2f} TB/s")
    with torch.no_grad():
        host_times(bench)
        run(bench, [part for part in parts if part != "training"])
    run(bench, [part for part in parts if part == "training"])
    write(bench, arguments.out, arguments)


if __name__ == "__main__":
    main()
