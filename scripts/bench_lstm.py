"""LSTM layers with block-sparse weights against torch's, which is cuDNN's on a GPU: forward and training.

Prerequisite: a CUDA GPU. The command behind docs/benchmarks/lstm.md:

    python scripts/bench_lstm.py --out docs/benchmarks

One layer of as many inputs as hidden units. Correctness comes first: against the same weights with zeros in float32,
the sparse layer's error may be at most twice that of the dense layer in the same dtype; if it is not, there is no
number. Times are medians, in turns, the L2 cache emptied before each; *graph* replays CUDA graphs (the GPU's time
alone), *eager* is until the GPU is done, the host's work included. The dense layer runs on random weights without
zeros; against bfloat16 it runs in float16 too, for which cuDNN has more kernels, and the faster one counts. For a quick
look on a CPU: `--hidden 256 --batch 4 --steps 16 --dtype float32 --device cpu`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsify
from sparsify import measure
from sparsify.bench.timing import race
from sparsify.kernels.recurrent import recurrence


def layers(
    cls: type[nn.Module], hidden: int, block: str, sparsity: float, device: str = "cpu"
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A block-sparse layer, the dense one with zeros that it stands for, and one without zeros; float32."""
    torch.manual_seed(0)
    with torch.device(device):
        net = nn.ModuleDict({"rnn": cls(hidden, hidden)})
    whole, zeros = copy.deepcopy(net["rnn"]), copy.deepcopy(net)
    result = sparsify.prune(net, method="random_blocks", block=block, sparsity=sparsity, scope="layer")
    with torch.no_grad():
        for name, mask in result.masks.items():
            zeros.get_parameter(name).mul_(mask.elements().to(device))
    return net["rnn"], zeros["rnn"], whole


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call of the layer without gradients."""
    return lambda: layer(x)[0]


def training(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """A call of the layer and the way back, to all weights and to the input."""

    def run() -> object:
        with torch.enable_grad():
            inputs = [x, *layer.parameters()]
            return torch.autograd.grad(layer(x)[0], inputs, dy)

    return run


def stepwise(call: Callable[[], object]) -> Callable[[], object]:
    """The same call with a product and a pointwise kernel for each time step, instead of all in one launch."""

    def run() -> object:
        recurrence.PERSISTENT = False
        try:
            return call()
        finally:
            recurrence.PERSISTENT = True

    return run


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    return float((got.float() - expected).norm() / expected.norm())


def check(sparse: nn.Module, zeros: nn.Module, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Errors of outputs and of the input's gradient, sparse and dense, in `dtype` against float32.

    Raises:
        SystemExit: If the sparse layer's are more than twice the dense one's.
    """
    results = []
    exact = copy.deepcopy(zeros).to(x.device, torch.float32)
    for layer, kind in ((exact, torch.float32), (sparse, dtype), (zeros, dtype)):
        given = x.detach().to(kind).requires_grad_()
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y = layer(given)[0]
            results.append((y.detach(), torch.autograd.grad(y, given, dy.to(kind))[0]))
    found = {}
    for what, expected, own, dense in zip(("output", "gradient"), *results, strict=True):
        found[f"{what}_error"], found[f"dense_{what}_error"] = error(own, expected), error(dense, expected)
        if not found[f"{what}_error"] <= 2 * found[f"dense_{what}_error"] + 1e-5:
            raise SystemExit(f"the sparse layer's {what} is wrong, no time is given: {found}")
    return found


def case(
    options: argparse.Namespace, hidden: int, batch: int, block: str, sparsity: float
) -> list[dict[str, Any]]:
    """Rows of one shape: forward and training, as CUDA graphs and eagerly."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    sparse, zeros, whole = layers(getattr(nn, options.kind.upper()), hidden, block, sparsity, options.device)
    x, dy = (torch.randn(options.steps, batch, hidden).to(device, dtype) for _ in range(2))
    for layer in (sparse, zeros, whole):
        layer.to(device, dtype)
    errors = check(sparse, zeros, x, dy, dtype)
    del zeros
    rows = []
    rivals: dict[str, tuple[nn.Module, torch.dtype]] = {
        "sparse": (sparse, dtype),
        options.dtype: (whole, dtype),
    }
    if dtype == torch.bfloat16 and device.type == "cuda":
        rivals["float16"] = copy.deepcopy(whole).half(), torch.float16
    ways = [True, False] if device.type == "cuda" else [False]
    for mode, graphs in itertools.product(("forward", "training"), ways):
        calls: dict[str, Callable[[], object]] = {}
        for name, (layer, kind) in rivals.items():
            layer.train(mode == "training")  # else cuDNN keeps what only a backward pass needs
            given = x.detach().to(kind, copy=True).requires_grad_(mode == "training")
            calls[name] = training(layer, given, dy.to(kind)) if mode == "training" else forward(layer, given)
        calls["steps"] = stepwise(calls["sparse"])
        times = race(calls, device, options.repeats, graphs=graphs)
        if graphs and times.timing != "graph":
            continue  # one of them cannot be captured
        fastest = min(set(rivals) - {"sparse"}, key=lambda name: times.seconds[name])
        dense, own = times.seconds[fastest], times.seconds["sparse"]
        rows.append(
            {
                "mode": mode,
                "hidden": hidden,
                "batch": batch,
                "block": block,
                "sparsity": sparsity,
                "timing": times.timing,
                "dense": fastest,
                "dense_ms": dense * 1e3,
                "sparse_ms": own * 1e3,
                "steps_ms": times.seconds["steps"] * 1e3,
                "speedup": dense / own,
                **errors,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def as_markdown(report: dict[str, Any]) -> str:
    """The page: a table for each mode and way of timing."""
    environment, settings = report["environment"], report["settings"]
    machine = ", ".join(environment.get("gpu") or [environment["cpu"]])
    lines = [
        f"# {settings['kind'].upper()} layers against torch's", "",
        f"One layer of as many inputs as hidden units, {settings['steps']} time steps, {settings['dtype']}; {machine}, "
        f"torch {environment['versions']['torch']}, cuDNN {report['cudnn']}. Milliseconds, medians, and how many times "
        "faster the block-sparse layer is. *Dense*: in the dtype named, the faster of this one and float16. *Step by "
        "step*: the same layer with two kernels a time step instead of one launch for all. *graph*: replayed CUDA "
        "graphs, the GPU's time alone; *eager*: the host's work included.", "",
        "```bash", "python scripts/bench_lstm.py --out docs/benchmarks", "```", "",
    ]  # fmt: skip
    keys = dict.fromkeys((row["mode"], row["timing"]) for row in report["rows"])
    for mode, timing in keys:
        rows = [row for row in report["rows"] if (row["mode"], row["timing"]) == (mode, timing)]
        won = sum(row["speedup"] > 1 for row in rows)
        lines += [
            f"## {mode.capitalize()}, {timing}", "", f"Faster than dense in {won} of {len(rows)} cases.", "",
            "| hidden | batch | block | sparsity | dense | sparse | step by step | speed-up |",
            "|---:|---:|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for row in rows:
            shape = f"{row['hidden']} | {row['batch']} | {row['block']} | {row['sparsity']:.0%}"
            lines.append(
                f"| {shape} | {row['dense_ms']:.3f} {row['dense']} | {row['sparse_ms']:.3f} | {row['steps_ms']:.3f} | "
                f"{row['speedup']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("lstm", "gru"), default="lstm")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--block", nargs="+", default=["64x64"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.75, 0.9])
    parser.add_argument("--steps", type=int, default=128, help="time steps")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder of JSON and page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures every shape, and writes `lstm.json` and `lstm.md` (or `gru...`)."""
    options = parse(arguments)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    report = {"environment": measure.environment(), "cudnn": cudnn, "settings": settings, "rows": []}
    shapes = itertools.product(options.hidden, options.batch, options.block, options.sparsity)
    for shape in shapes:
        report["rows"] += case(options, *shape)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{options.kind}.json").write_text(json.dumps(report, indent=1) + "\n")
            (options.out / f"{options.kind}.md").write_text(as_markdown(report))


if __name__ == "__main__":
    main()
