"""What block sparsity costs ResNet-20 and ResNet-32 on CIFAR-10: accuracy beside that of the dense network.

Prerequisite: the training pictures as an archive of JPEG files, and the published weights (`resnet20-*.th`). The
command behind docs/benchmarks/resnet-cifar10.md:

    python scripts/bench_resnet.py --pictures path/to/cifar10_jpeg_train.tar.xz --weights path/to/resnet-cifar10 \\
        --out docs/benchmarks --jobs 6

The published weights were trained on lossless pictures, so they are first fine-tuned on the JPEG ones: that is the
dense network, and the teacher. Then, for each seed, it is pruned little by little while it trains on (magnitude, one
budget for all 3x3 convolutions of the stages), healed under the fixed masks, packed, saved, loaded again and scored.
Beside it the dense network trains on for as long, with the same teacher, order and augmentation: a loss is what the
sparse one lacks of that. 5,000 training pictures are held out for scoring alone; nothing is chosen by them. (The
published weights have seen them, lossless, so all accuracies are too high, and the dense network's the most.)

Rows are kept as they come, and a run goes on where it was stopped. Forward passes are timed at the end, when nothing
trains any more: each sparse network in turns with the dense one beside it. For a quick look on a CPU:
`--limit 2000 --epochs 1 --dense-epochs 1 --models resnet20 --seeds 1`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import sparsify
from bench_rows import store, write
from cifar_resnet import Pictures, accuracy, build, normalised, published, read, split, train
from sparsify import measure
from sparsify.bench.timing import cudnn_chooses, race

FILE = "resnet-cifar10.json"
GOALS = {0.5: 0.7, 0.75: 2.0}  # points that may be lost, by sparsity
TARGETS = ["re:^layer"]


def pictures_of(options: argparse.Namespace) -> tuple[Pictures, Pictures]:
    """Training and validation pictures on the device."""
    training, held = split(read(options.pictures, options.cache))
    if options.limit:
        chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))[: options.limit]
        training = Pictures(training.pixels[chosen], training.labels[chosen])
    return training.to(options.device), held.to(options.device)


def dense_file(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where the fine-tuned dense network is kept."""
    return options.cache / f"{name}-{seed}-{options.dense_epochs}-{options.batch}-{options.limit}.safetensors"


def fine_tuned(name: str, seed: int, options: argparse.Namespace) -> nn.Module:
    """The dense network on the device; trained if it has not been yet."""
    file = dense_file(name, seed, options)
    if file.exists():
        model = build(name)
        load_model(model, file)
        return model.to(options.device).eval()
    torch.manual_seed(seed)
    training, _ = pictures_of(options)
    model = published(name, options.weights).to(options.device)
    train(
        model, training, epochs=options.dense_epochs, batch=options.batch, rate=options.dense_rate, seed=seed
    )
    save_model(model, str(file.with_suffix(".tmp")))
    file.with_suffix(".tmp").replace(file)
    return model


def row(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores one network."""
    torch.set_num_threads(max(1, options.threads))
    name, seed = case["model"], case["seed"]
    begin = time.perf_counter()
    teacher = fine_tuned(name, seed, options).requires_grad_(False)
    training, held = pictures_of(options)
    torch.manual_seed(seed)
    model = copy.deepcopy(teacher).requires_grad_(True)
    loops: list[sparsify.SparsifyLoop] = []

    def started(optimizer: torch.optim.Optimizer, steps: int) -> None:
        if case["form"] == "sparse":
            loop = sparsify.SparsifyLoop(
                model, optimizer, steps=steps, method=options.method, block=case["block"], sparsity=case["sparsity"],
                per_position=case["masks"] == "each", targets=TARGETS, until=options.until,
            )  # fmt: skip
            loops.append(loop)

    train(
        model, training, epochs=options.epochs, batch=options.batch, rate=options.rate, seed=1000 + seed,
        teacher=teacher, started=started,
    )  # fmt: skip
    kept = 1.0
    if loops:
        masks = loops[0].finish().values()
        kept = sum(mask.elements_kept for mask in masks) / sum(
            mask.shape[0] * mask.shape[1] for mask in masks
        )
    folder = kept_in(case, options)
    sparsify.save(model, folder, force=True)
    loaded = sparsify.load(folder, device=options.device, model=build(name))
    return case | {
        "epochs": options.epochs,
        "dense_epochs": options.dense_epochs,
        "method": options.method if loops else "",
        "before": accuracy(teacher, held),
        "accuracy": accuracy(loaded, held),
        "density": kept,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": time.perf_counter() - begin,
    }


def kept_in(case: dict[str, Any], options: argparse.Namespace) -> Path:
    """Where the network of a case, or of its row, is kept."""
    names = (str(case[key]) for key in ("model", "form", "block", "sparsity", "masks", "seed"))
    return options.cache / "networks" / "-".join(filter(None, names))


def relative_time(one: dict[str, Any], options: argparse.Namespace) -> float | None:
    """Time of a forward pass of 256 pictures over that of the dense network, in bfloat16 on a GPU.

    `None` if one of the networks is not kept here.
    """
    dense = one | {"form": "dense", "block": "", "sparsity": 0.0, "masks": ""}
    folders = {"dense": kept_in(dense, options), "sparse": kept_in(one, options)}
    if not all(folder.exists() for folder in folders.values()):
        return None
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pixels: Tensor = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, device=device)
    x, calls = normalised(pixels).to(dtype), {}
    for name, folder in folders.items():
        model = sparsify.load(folder, device=options.device, model=build(one["model"])).to(dtype).eval()
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        calls[name] = partial(model, x)
    with cudnn_chooses():
        seconds = race(calls, device, 20).seconds
    return seconds["sparse"] / seconds["dense"]


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What there is to measure, the dense networks first."""
    for name, seed in itertools.product(options.models.split(","), range(options.seeds)):
        yield {"model": name, "form": "dense", "block": "", "sparsity": 0.0, "masks": "", "seed": seed}
    settings = itertools.product(
        options.models.split(","), options.blocks.split(","), map(float, options.sparsities.split(",")),
        options.masks.split(","), range(options.seeds),
    )  # fmt: skip
    for name, block, sparsity, masks, seed in settings:
        yield {
            "model": name,
            "form": "sparse",
            "block": block,
            "sparsity": sparsity,
            "masks": masks,
            "seed": seed,
        }


def measured(left: Sequence[dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows as they come, from so many processes at once as asked for."""
    if options.jobs <= 1:
        yield from (row(case, options) for case in left)
        return
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        # Networks that several rows begin from are trained once, before these.
        teachers = dict.fromkeys((case["model"], case["seed"]) for case in left)
        wanted = [pair for pair in teachers if not dense_file(*pair, options).exists()]
        for future in [pool.submit(_fine_tune, *pair, options) for pair in wanted]:
            future.result()
        for future in as_completed([pool.submit(row, case, options) for case in left]):
            yield future.result()


def _fine_tune(name: str, seed: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, options.threads))
    fine_tuned(name, seed, options)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each network, block, sparsity and kind of mask: points lost by seed, and what is left of bytes and time."""
    dense = {(row["model"], row["seed"]): row for row in rows if row["form"] == "dense"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in rows:
        if one["form"] == "sparse" and (one["model"], one["seed"]) in dense:
            groups.setdefault(tuple(one[key] for key in ("model", "block", "sparsity", "masks")), []).append(
                one
            )
    found = []
    for key, own in sorted(groups.items()):
        beside = [dense[one["model"], one["seed"]] for one in own]
        lost = [other["accuracy"] - one["accuracy"] for one, other in zip(own, beside, strict=True)]
        times = [one["time"] for one in own if one.get("time") is not None]
        found.append(
            dict(zip(("model", "block", "sparsity", "masks"), key, strict=True))
            | {
                "seeds": len(own),
                "dense": statistics.fmean(other["accuracy"] for other in beside),
                "accuracy": statistics.fmean(one["accuracy"] for one in own),
                "lost": statistics.fmean(lost),
                "most": max(lost),
                "goal": GOALS.get(key[2]),
                "bytes": statistics.fmean(one["bytes"] for one in own) / beside[0]["bytes"],
                "time": statistics.fmean(times) if times else None,
            }
        )
    return found


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    environment = report["environment"]
    machine = ", ".join([*(environment.get("gpu") or ["CPU"]), f"torch {environment['versions']['torch']}"])
    lines = [
        "# Residual networks on CIFAR-10",
        "",
        "Validation accuracy of ResNet-20 and ResNet-32, block-sparse beside dense, on 5,000 pictures held out of the",
        "JPEG training set. The dense network trains on for as long as the sparse one, with the same teacher (the",
        "fine-tuned network itself), order and augmentation; *lost* is its accuracy less the sparse one's, in points,",
        "mean over the seeds and, as *most*, of the worst one. Masks are shared by the nine kernel positions or each",
        "has its own. The published weights have seen the held-out pictures, lossless: all accuracies are too high,",
        "and the dense network's the most. Bytes are those of the weight file and time that of a forward pass of 256",
        "pictures, over dense's.",
        "",
        "```bash",
        report["command"],
        "```",
        "",
        f"{machine}.",
        "",
        "| network | block | sparsity | masks | seeds | dense % | sparse % | lost | most | goal | bytes | time |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in summary(report["rows"]):
        goal = (
            ""
            if one["goal"] is None
            else f"{one['goal']:.1f}{'' if one['lost'] <= one['goal'] else ' missed'}"
        )
        lines.append(
            f"| {one['model']} | {one['block']} | {one['sparsity']:.0%} | {one['masks']} | {one['seeds']} | "
            f"{one['dense']:.2f} | {one['accuracy']:.2f} | {one['lost']:.2f} | {one['most']:.2f} | {goal} | "
            f"{one['bytes']:.2f} | {'' if one['time'] is None else format(one['time'], '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--pictures", type=Path, required=True, help="archive of JPEG files, <split>/<class>/<name>.jpg"
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder of the published weights")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and Markdown")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "sparsify-cifar10"))
    parser.add_argument("--models", default="resnet20,resnet32")
    parser.add_argument("--blocks", default="8x8,16x16")
    parser.add_argument("--sparsities", default="0.5,0.75")
    parser.add_argument("--masks", default="each", help="each, shared, or both: each,shared")
    parser.add_argument("--method", default="magnitude", help="pruner")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, default=40, help="of pruning and healing, and of dense beside it"
    )
    parser.add_argument("--dense-epochs", type=int, default=20, help="of fine-tuning the published weights")
    parser.add_argument(
        "--until", type=float, default=0.5, help="share of the steps after which masks are fixed"
    )
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate of pruning")
    parser.add_argument("--dense-rate", type=float, default=0.02, help="highest learning rate of fine-tuning")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--limit", type=int, default=0, help="training pictures; 0 for all")
    parser.add_argument("--jobs", type=int, default=1, help="networks trained at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measures what is missing, and writes the page."""
    options = arguments(given)
    options.out.mkdir(parents=True, exist_ok=True)
    options.cache.mkdir(parents=True, exist_ok=True)
    file = options.out / FILE
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    environment = measure.environment()
    del environment["command"]
    report |= {"environment": environment, "command": "python " + " ".join(sys.argv)}
    left = [case for case in cases(options) if not any(case.items() <= one.items() for one in report["rows"])]
    read(options.pictures, options.cache)  # once, before several processes want it
    store(report, measured(left, options), file)
    for one in report["rows"]:
        if one["form"] == "sparse" and one.get("time") is None:
            one["time"] = relative_time(one, options)
    write(report, file)
    file.with_suffix(".md").write_text(page(report), encoding="utf-8")
    print(page(report))


if __name__ == "__main__":
    main()
