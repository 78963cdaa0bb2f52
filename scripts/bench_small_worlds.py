"""Do larger sparse layers beat smaller dense ones of as many parameters? Trains both from scratch, and says.

Prerequisite: MNIST as compressed IDX files (`train-images-idx3-ubyte.xz`, ...), and a folder of archives of books (see
`reference_lm.py`). The command behind docs/benchmarks/small-worlds.md:

    python scripts/bench_small_worlds.py --mnist path/to/mnist --books path/to/classic-books --out docs/benchmarks

Every network is trained with each learning rate on the first seed; the one with the smaller loss on data held out of
the training set is taken for the other seeds. Rows are kept as they come, and a run goes on where it was stopped;
`--task` trains one task. For a quick look on a CPU: `--scale 0.05 --seeds 1`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench_rows import store
from small_worlds import NETWORKS, TASKS, Data, Task, build, parameters, scaled
from small_worlds_page import as_markdown, draw
from sparsify import measure

FILE = "small-worlds.json"
POINTS = 8  # of a training's curve


def losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy in nats, and the share of wrong answers."""
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
        logits = model(x).flatten(0, -2).float()
    y = y.flatten()
    return F.cross_entropy(logits, y), (logits.argmax(1) != y).float().mean()


@torch.no_grad()
def score(model: nn.Module, data: tuple[Tensor, Tensor], batch: int) -> dict[str, float]:
    """Loss in nats and errors, 0 to 1, over a whole set."""
    model.eval()
    parts = list(zip(*(part.split(batch * 4) for part in data), strict=True))
    found = torch.tensor([[len(y), *(len(y) * value for value in losses(model, x, y))] for x, y in parts])
    model.train()
    total = found.sum(0).tolist()
    return {"loss": total[1] / total[0], "error": total[2] / total[0]}


def train(task: Task, data: Data, kind: str, seed: int, rate: float) -> dict[str, Any]:
    """Trains one network; its row."""
    network = build(task, kind, seed)
    model = network.model.to(data.device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, task.steps // 20)

    def share(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / task.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    curve: list[tuple[int, float]] = []
    begin = time.perf_counter()
    for step, (x, y) in zip(range(1, task.steps + 1), data.batches(seed), strict=False):
        loss, _ = losses(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, task.steps // POINTS) == 0:
            curve.append((step, loss.item()))
    seconds = time.perf_counter() - begin
    return {
        "task": task.name, "network": kind, "seed": seed, "rate": rate, "parameters": parameters(model),
        "density": network.density, "mix": network.mix, "steps": task.steps, "seconds": seconds,
        "valid": score(model, data.valid, task.batch), "test": score(model, data.test, task.batch), "curve": curve,
    }  # fmt: skip


def rows(
    report: dict[str, Any], task: Task, data: Data, seeds: int, only: list[str]
) -> Iterator[dict[str, Any]]:
    """Trains what is missing: each learning rate with the first seed, the better one with the others."""
    for kind in only:

        def found(seed: int, rate: float, kind: str = kind) -> dict[str, Any] | None:
            key = (task.name, kind, seed, rate)
            return next(
                (r for r in report["rows"] if (r["task"], r["network"], r["seed"], r["rate"]) == key), None
            )

        for rate in task.rates:
            if found(0, rate) is None:
                yield train(task, data, kind, 0, rate)
        best = min(task.rates, key=lambda rate: found(0, rate)["valid"]["loss"])  # pyright: ignore
        for seed in range(1, seeds):
            if found(seed, best) is None:
                yield train(task, data, kind, seed, best)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's compressed IDX files")
    parser.add_argument("--books", type=Path, help="folder of the archives of books")
    parser.add_argument(
        "--task", choices=TASKS, action="append", help="train this task alone (may be repeated)"
    )
    parser.add_argument("--network", choices=NETWORKS, action="append", help="train this network alone")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each network")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="steps, and below 1 also widths, by this factor"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks"), help="folder of JSON, page and picture"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Trains, and writes `small-worlds.json`, `.md` and `.png`."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / FILE
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": [], "machines": {}}
    environment = measure.environment()
    machine = ", ".join(environment.get("gpu") or [environment.get("cpu") or options.device])
    for name in options.task or TASKS:
        folder = options.mnist if name == "mnist" else options.books
        if folder is None:
            raise SystemExit(f"task {name} needs --{'mnist' if name == 'mnist' else 'books'}")
        task = scaled(TASKS[name], options.scale)
        report["machines"][name] = f"{machine}, torch {environment['versions']['torch']}"
        data = Data(task, folder, options.device)
        store(report, rows(report, task, data, options.seeds, options.network or list(NETWORKS)), file)
    (options.out / "small-worlds.md").write_text(as_markdown(report))
    draw(report, options.out / "small-worlds.png")


if __name__ == "__main__":
    main()
