"""Block-sparse networks beside dense ones in four domains: speech, recommendation, anomaly detection, images.

The command behind docs/benchmarks/domains.md; a domain whose data is not given is left out:

    python scripts/bench_domains.py --nab path/to/nab --interactions path/to/Video.txt \\
        --keywords path/to/kwt1-and-digits --mnist path/to/mnist --out docs/benchmarks

`--nab` is a folder with data/ and labels/, `--keywords` one with kwt1.safetensors and recordings/ (see
recipes/keyword_spotting.py), `--mnist` one with MNIST's four files as .xz. Rows that are in OUT/domains.json already
are kept, so that an interrupted run goes on, on each device. `--only` takes a regular expression such as `anomaly` or
`0.75`; several commands with different ones may run side by side. For a quick look: `--scale 0.02`, a fiftieth of the
training.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import domain_classifiers
import sparsify
from bench_rows import missing
from domains_page import as_markdown
from sparsify import measure
from sparsify.recipes import plain_modules
from sparsify.recipes.anomaly_detection import AnomalyDetection
from sparsify.recipes.keyword_spotting import KeywordSpotting
from sparsify.recipes.sequential_recommender import SequentialRecommender

SEEDS = 3


@dataclass(frozen=True)
class Case:
    """One sparse network; the dense one of its domain and seed stands beside it."""

    domain: str
    block: str
    sparsity: float
    seed: int


# Block shapes and sparsities of each domain.
DOMAINS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "anomaly": (("16x16", "64x64"), (0.5, 0.75, 0.9)),
    "recommendation": (("16x16",), (0.6, 0.75)),
    "keywords": (("8x8", "16x16"), (0.5, 0.75)),
    "speech": (("16x16",), (0.5, 0.75)),
    "images": (("16x16",), (0.5, 0.75)),
}
RECIPES = {"speech": "speech_classification", "images": "vit_classification"}
# What differs from a recipe: many small pictures want larger batches and fewer rounds.
SETTINGS = {
    "images": [f"stages.{stage}.{setting}" for stage in (1, 3) for setting in ("batch=128", "learning_rate=5e-4")]
    + ["stages.1.epochs=3", "stages.3.epochs=1"]
}  # fmt: skip
# A Whisper encoder's sizes on a CPU (those of `tiny`) and on a GPU (those of `small`), to time it.
ENCODERS = {"cpu": (384, 4, 6), "cuda": (768, 12, 12)}


def cases() -> list[Case]:
    """All cases, those of one dense network together."""
    return [
        Case(domain, block, sparsity, seed)
        for domain, (blocks, sparsities) in DOMAINS.items()
        for seed in range(SEEDS)
        for block in blocks
        for sparsity in sparsities
    ] + [Case("whisper-encoder", "64x64", sparsity, 0) for sparsity in (0.5, 0.75, 0.9)]


def plain_domain(case: Case, args: argparse.Namespace) -> plain_modules.Domain:
    """The domain of a plain module, its trainings scaled."""
    if case.domain == "anomaly":
        made: Any = AnomalyDetection(args.nab)
    elif case.domain == "recommendation":
        made = SequentialRecommender(args.interactions)
    else:
        made = KeywordSpotting(args.keywords, fold=case.seed % 3)
    for kind in ("dense", "sparse"):
        length = getattr(made, kind)
        setattr(made, kind, replace(length, steps=max(4, round(length.steps * args.scale))))
    return made


def plain_rows(chosen: list[Case], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of cases that share a domain and a seed."""
    domain, seed = plain_domain(chosen[0], args), chosen[0].seed
    dense = plain_modules.train_dense(domain, seed, args.device)
    quality = {"dense": domain.evaluate(dense)}
    quality["dense_longer"] = domain.evaluate(plain_modules.train_longer(domain, dense, seed))
    for case in chosen:
        start = time.perf_counter()
        sparse = plain_modules.compress(domain, dense, case.block, case.sparsity, seed)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            costs = plain_modules.costs(domain, dense, sparse, Path(folder))
        own = quality | {"sparse": domain.evaluate(sparse)}
        yield asdict(case) | {"metric": domain.metric, "quality": own, "costs": costs, "seconds": seconds}


def recipe_rows(chosen: list[Case], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of checkpoints of transformers, pruned by a recipe of the package; cases share a domain and a seed."""
    first = chosen[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if first.domain == "speech":
            recordings = args.keywords / "recordings"
            domain_classifiers.speech(recordings, folder, first.seed % 3, args.scale, args.device)
            data = {"train": folder / "train", "eval": folder / "test"}
        else:
            domain_classifiers.images(args.mnist, folder, first.seed, args.scale, args.device)
            data = {"train": folder / "train.parquet", "eval": folder / "test.parquet"}
        for case in chosen:
            settings = [f"data.{use}.path={path}" for use, path in data.items()] + SETTINGS.get(
                case.domain, []
            )
            settings += [
                f"pruner.block={case.block}",
                f"pruner.sparsity={case.sparsity}",
                f"seed={case.seed}",
            ]
            if args.scale < 1:
                settings += [f"stages.{index}.steps={max(2, round(600 * args.scale))}" for index in (1, 3)]
                settings += [f"stages.{index}.epochs=" for index in (1, 3)]
                settings += [f"data.{use}.samples={max(40, round(2000 * args.scale))}" for use in data]
            start = time.perf_counter()
            recipe, dense, out = RECIPES[case.domain], str(folder / "dense"), folder / "sparse"
            result = sparsify.run(recipe, model=dense, out=out, overrides=settings, force=True)
            seconds = time.perf_counter() - start
            columns: Any = (result.report or {})["columns"]
            labels = {"dense": "dense", "pruned": "pruned", "sparse": "recovered"}
            costs = {
                name: {
                    "bytes": columns[label]["bytes"],
                    "parameters": columns[label]["parameters"],
                    "latency_ms": 1e3 * next(iter(columns[label]["latency"].values())),
                }
                for name, label in labels.items()
                if name != "pruned"
            }
            quality = {
                name: {"accuracy": columns[label]["quality"]["accuracy"] / 100}
                for name, label in labels.items()
            }
            yield asdict(case) | {
                "metric": "accuracy",
                "quality": quality,
                "costs": costs,
                "seconds": seconds,
            }


def encoder_rows(chosen: list[Case], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Speed alone: a Whisper-shaped encoder with random weights on half a minute of sound."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    kind = torch.device(args.device).type
    width, layers, heads = ENCODERS[kind]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    config = WhisperConfig(
        d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width
    )
    torch.manual_seed(0)
    dense: nn.Module = WhisperEncoder(config).to(args.device, dtype).eval()
    inputs = {"input_features": torch.randn(1, 80, 3000, device=args.device, dtype=dtype)}
    for case in chosen:
        start = time.perf_counter()
        sparse = copy.deepcopy(dense)
        sparsify.prune(
            sparse,
            method="random_blocks",
            block=case.block,
            sparsity=case.sparsity,
            scope="layer",
            targets=["Linear"],
        )
        seconds = measure.compare_latency({"dense": dense, "sparse": sparse}, inputs, repeats=args.repeats)
        costs = {
            name: {
                "bytes": measure.model_bytes(model),
                "parameters": measure.parameter_count(model),
                "latency_ms": 1e3 * seconds[name],
            }
            for name, model in (("dense", dense), ("sparse", sparse))
        }
        took = time.perf_counter() - start
        yield asdict(case) | {"metric": None, "quality": {}, "costs": costs, "seconds": took}


def maker(domain: str) -> Callable[[list[Case], argparse.Namespace], Iterator[dict[str, Any]]]:
    """What measures a domain."""
    if domain == "whisper-encoder":
        return encoder_rows
    return recipe_rows if domain in RECIPES else plain_rows


def read(file: Path) -> list[dict[str, Any]]:
    """The rows that a file holds."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def add(file: Path, row: dict[str, Any]) -> None:
    """Adds a row and writes the file and the page anew; one process at a time."""
    print(json.dumps(row), flush=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = [*read(file), row]
        order = {tuple(asdict(case).values()): index for index, case in enumerate(cases())}
        keys = [field.name for field in fields(Case)]
        rows.sort(key=lambda one: (one["device"], order.get(tuple(one[key] for key in keys), len(order))))
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        fresh.replace(file)
        file.with_suffix(".md").write_text(as_markdown(rows))
    finally:
        os.close(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nab", type=Path)
    parser.add_argument("--interactions", type=Path)
    parser.add_argument("--keywords", type=Path)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=20, help="timed passes of the encoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--busy", action="store_true", help="say that the machine had other work to do")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = {
        "anomaly": args.nab, "recommendation": args.interactions, "keywords": args.keywords,
        "speech": args.keywords, "images": args.mnist, "whisper-encoder": True,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "domains.json"
    environment = measure.environment()
    del environment["command"]
    machine = {"device": args.device, "scale": args.scale, "busy": args.busy, "environment": environment}
    done = [row for row in read(file) if (row["device"], row["scale"]) == (args.device, args.scale)]
    wanted = missing({"rows": done}, (case for case in cases() if data[case.domain]), args.only)
    for group in dict.fromkeys((case.domain, case.seed) for case in wanted):
        chosen = [case for case in wanted if (case.domain, case.seed) == group]
        for row in maker(chosen[0].domain)(chosen, args):
            add(file, row | machine)


if __name__ == "__main__":
    main()
