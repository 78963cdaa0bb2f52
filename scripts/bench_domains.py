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
# How the dense network of a recipe is trained from random weights.
DENSE: dict[str, dict[str, Any]] = {
    "speech": {"epochs": 12, "batch": 64, "learning_rate": 1e-3, "warmup": 0.1},
    "images": {"epochs": 6, "batch": 64, "learning_rate": 1e-3, "warmup": 0.1},
}
# What differs from a recipe, in its search and in its healing: many small inputs want larger batches and fewer rounds.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "speech": ({"epochs": 6}, {"epochs": 3}),
    "images": (
        {"epochs": 3, "batch": 128, "learning_rate": 5e-4},
        {"epochs": 1, "batch": 128, "learning_rate": 5e-4},
    ),
}
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
            made = domain_classifiers.speech(args.keywords / "recordings", folder, first.seed % 3)
        else:
            made = domain_classifiers.images(args.mnist, folder)
        frame: dict[str, Any] = {
            "seed": first.seed,
            "device": args.device,
            "data": {use: {"path": str(made[use])} for use in ("train", "eval")},
        }
        dense: dict[str, Any] = (
            recipe(first.domain) | frame | {"model": str(made["blank"]), "out": str(folder / "dense")}
        )
        dense["from_scratch"] = True
        dense["stages"] = [{"stage": "finetune", **_shortened(DENSE[first.domain], args.scale)}]
        sparsify.run(sparsify.Recipe.from_dict(dense))
        longer: dict[str, Any] = recipe(first.domain, args.scale) | frame | {"model": str(folder / "dense")}
        longer["stages"] = [_unpruned(stage) for stage in longer["stages"] if stage["stage"] != "convert"]
        columns = _columns(longer | {"out": str(folder / "longer")})
        shared = {"dense": columns["dense"], "dense_longer": columns["recovered"]}
        for case in chosen:
            sparse: dict[str, Any] = (
                recipe(case.domain, args.scale) | frame | {"model": str(folder / "dense")}
            )
            search = next(stage["pruner"] for stage in sparse["stages"] if "pruner" in stage)
            search |= {"block": case.block, "sparsity": case.sparsity}
            start = time.perf_counter()
            columns = _columns(sparse | {"out": str(folder / f"{case.block} {case.sparsity}")})
            seconds = time.perf_counter() - start
            found = shared | {"pruned": columns["pruned"], "sparse": columns["recovered"]}
            quality = {name: {"accuracy": one["quality"]["accuracy"] / 100} for name, one in found.items()}
            costs = {
                name: {
                    "bytes": column["bytes"],
                    "parameters": column["parameters"],
                    "latency_ms": 1e3 * next(iter(column["latency"].values())),
                }
                for name, column in (("dense", columns["dense"]), ("sparse", columns["recovered"]))
            }
            yield asdict(case) | {
                "metric": "accuracy",
                "quality": quality,
                "costs": costs,
                "seconds": seconds,
            }


def recipe(domain: str, scale: float = 1.0) -> dict[str, Any]:
    """The package's recipe of a domain with `SETTINGS`, as plain data."""
    plain = sparsify.Recipe.load(RECIPES[domain]).model_dump(exclude_unset=True, mode="json")
    trainings = [stage for stage in plain["stages"] if stage["stage"] == "finetune" and stage.get("epochs")]
    for stage, settings in zip(trainings, SETTINGS[domain], strict=True):
        stage |= _shortened(settings, scale)
    return plain


def _shortened(training: dict[str, Any], scale: float) -> dict[str, Any]:
    return training | {"epochs": training["epochs"] * scale}


def _unpruned(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage without its pruning, for the dense network that trains as long as a sparse one."""
    return {key: value for key, value in stage.items() if key not in ("pruner", "heal")}


def _columns(plain: dict[str, Any]) -> dict[str, Any]:
    """Runs a recipe, and gives the columns of its report."""
    return (sparsify.run(sparsify.Recipe.from_dict(plain)).report or {})["columns"]


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
