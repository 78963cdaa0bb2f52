"""Compress a small language model, and see what that did to its quality, size, memory and speed.

The model comes with the repository (`recipes/demo`), the text from the running Python (`demo_corpus.py`), the work
is a recipe (`recipes/quickstart.yaml`). At the end one table shows the dense model beside the pruned and the
recovered one, measured in the same run, and the compressed model writes a line of text. Exits with 1 if it is not
smaller on disk than the dense model, or not faster at 256 tokens on the CPU. A GPU, if there is one, does the
training; it also gets its own lines of latency, but a model this small only waits for kernel launches there.

    ./scripts/quickstart              sets up an environment first
    python scripts/quickstart.py      in an environment where the project is installed
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify
from demo_corpus import collect, write
from sparsify import measure, plots, quality
from sparsify.cli.console import RichProgress, print_table, quiet_transformers, size
from sparsify.data import spec as data

ROOT = Path(__file__).resolve().parents[1]
DENSE = ROOT / "recipes" / "demo"
RECIPE = ROOT / "recipes" / "quickstart.yaml"
# What a run writes to its folder, and so what the next one may remove there.
MARK = ".quickstart"
CONTENT = (
    "corpus", "pruned", "pruned.work", "recovered", "recovered.work", "sparsify-scores",
    "masks.png", "loss.png", "quickstart.json",
)  # fmt: skip
TOKENS = (1, 256)
# Latency on the CPU is that of two threads on every machine: more of them do nothing for a model this small.
THREADS = 2
PROMPT = "If the file"


def load(path: Path, dtype: torch.dtype | str = "auto") -> Any:
    """A checkpoint, dense or block-sparse, as any program would load it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def prepare(out: Path) -> None:
    """Make the folder, or empty the one that an earlier quickstart left.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists())):
        raise FileExistsError(f"{out} exists and is not from a quickstart; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    for name in CONTENT:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def compress(out: Path, device: str, settings: list[str]) -> None:
    """Run the recipe, and beside it write what pruning alone gives; draw the masks and the loss.

    Args:
        out: Folder with the text; `pruned`, `recovered` and the pictures are written to it.
        device: Where to train.
        settings: `key=value` changes of the recipe.
    """
    text = json.dumps(str(out / "corpus" / "train.txt"))
    sources = [f"data.{name}.path={text}" for name in ("train", "calibration")]
    recipe = sparsify.Recipe.load(RECIPE, [f"device={device}", *sources, *settings], {"model": str(DENSE)})
    whole = recipe.model_dump(mode="json", exclude_none=True)
    untrained = [stage for stage in whole["stages"] if stage["stage"] != "finetune"]
    print("Pruning, without training ...", flush=True)
    sparsify.run(sparsify.Recipe.from_dict({**whole, "stages": untrained}), out=out / "pruned")
    print("Pruning again, and recovering ...", flush=True)
    result = sparsify.run(recipe, out=out / "recovered", progress=RichProgress())
    plots.mask_pictures(sparsify.masks_of(result.model), out / "masks.png")
    assert result.report is not None  # the recipe ends with a report stage
    losses = {
        f"stage {entry['stage'] + 1}": [(point["step"], point["loss"]) for point in entry["points"]]
        for entry in result.report["history"]
    }
    plots.loss_curve(losses, out / "loss.png")


def compare(paths: dict[str, Path], heldout: Path, device: str) -> dict[str, dict[str, Any]]:
    """Measure checkpoints side by side, in float32.

    Args:
        paths: Checkpoints by label.
        heldout: Text for the perplexity.
        device: Where the perplexity is computed; latency is measured on the CPU, and there too if it is a GPU.

    Returns:
        For each label `perplexity`, `parameters`, `bytes` on disk, `peak_memory` (bytes, a forward pass of 256
        tokens on the CPU) and `latency` (by device, then token count, in seconds).
    """
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    blocks = data.causal_blocks(data.DataSpec(path=heldout, length=512), tokenizer)
    models = {label: load(path, torch.float32) for label, path in paths.items()}
    columns: dict[str, dict[str, Any]] = {}
    for label, model in models.items():
        columns[label] = {
            "perplexity": quality.perplexity(model.to(device), blocks)["perplexity"],
            "parameters": measure.parameter_count(model),
            "bytes": measure.bytes_on_disk(paths[label]),
            "latency": {},
        }
    for place in sorted({device, "cpu"}):
        for model in models.values():
            model.to(place)
        for count in TOKENS:
            inputs = measure.token_inputs(models["dense"], count)
            for label, seconds in measure.compare_latency(models, inputs, repeats=40, warmup=5).items():
                columns[label]["latency"].setdefault(place, {})[count] = seconds
    for label, model in models.items():
        inputs = measure.token_inputs(model.to("cpu"), max(TOKENS))
        columns[label]["peak_memory"] = measure.peak_memory_forward(model, inputs)
    return columns


def show(columns: dict[str, dict[str, Any]]) -> None:
    """Print the table; its last column sets the recovered model beside the dense one."""
    rows = [
        row("held-out perplexity", [column["perplexity"] for column in columns.values()], "{:,.1f}"),
        row("parameters", [column["parameters"] for column in columns.values()], "{:,}"),
        row("bytes on disk", [column["bytes"] for column in columns.values()], "{:,}"),
        row(
            "peak memory of a forward",
            [column["peak_memory"] / 1e6 for column in columns.values()],
            "{:.1f} MB",
        ),
    ]
    for place in columns["dense"]["latency"]:
        for count in TOKENS:
            title = f"latency, {count} token{'s' if count > 1 else ''}, {'CPU' if place == 'cpu' else 'GPU'}"
            seconds = [column["latency"][place][count] for column in columns.values()]
            rows.append(row(title, [value * 1e3 for value in seconds], "{:.2f} ms"))
    print()
    print_table(["", *columns, "recovered / dense"], rows)


def row(title: str, values: list[float], form: str) -> list[str]:
    """One line of the table, with the ratio of the last value to the first."""
    return [title, *(form.format(value) for value in values), f"{values[-1] / values[0]:.2f}"]


def shortcomings(columns: dict[str, dict[str, Any]]) -> list[str]:
    """What the compressed model must be and is not."""
    dense, recovered = columns["dense"], columns["recovered"]
    found = []
    if recovered["bytes"] >= dense["bytes"]:
        found.append(f"it takes {recovered['bytes']:,} bytes on disk, the dense one {dense['bytes']:,}")
    slow, fast = recovered["latency"]["cpu"][max(TOKENS)], dense["latency"]["cpu"][max(TOKENS)]
    if slow >= fast:
        found.append(
            f"at {max(TOKENS)} tokens it takes {slow * 1e3:.2f} ms, the dense one {fast * 1e3:.2f} ms"
        )
    return found


def generate(path: Path) -> str:
    """A line of text from a checkpoint, loaded as any other."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = load(path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(tokens[0], skip_special_tokens=True).split("\n")[0]


def run(out: Path, device: str, settings: list[str]) -> int:
    """The whole quickstart; returns the exit status."""
    start = time.monotonic()
    prepare(out)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    print(f"A language model of {size(measure.bytes_on_disk(DENSE))}, compressed on {where}.")
    corpus = collect()
    write(corpus, out / "corpus")
    compress(out, device, settings)
    print("Measuring the dense, the pruned and the recovered model ...", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, threads))
    try:
        paths = {"dense": DENSE, "pruned": out / "pruned", "recovered": out / "recovered"}
        columns = compare(paths, out / "corpus" / "heldout.txt", device)
        environment = measure.environment()
    finally:
        torch.set_num_threads(threads)
    report = {"environment": environment, "text": corpus.fingerprint, "columns": columns}
    (out / "quickstart.json").write_text(json.dumps(report, indent=2) + "\n")
    show(columns)
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    print(f"{environment['cpu']}, {threads}, float32; bytes on disk: bfloat16.")
    print("pruned: the recipe without its training; recovered: what the whole recipe makes of it.")
    print(
        f"\ndense model      {DENSE}\ncompressed model {out / 'recovered'}\nnumbers          {out / 'quickstart.json'}"
    )
    print(f"\nThe compressed model writes:\n  {generate(out / 'recovered')}")
    faults = shortcomings(columns)
    for fault in faults:
        print(f"error: the compressed model fell short: {fault}", file=sys.stderr)
    print(f"\n{time.monotonic() - start:.0f} seconds")
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Compress a small language model and compare.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart-output"),
        help="folder to write; one that an earlier quickstart wrote is replaced (default: ./quickstart-output)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change the recipe, such as stages.0.block=32x32",
    )
    options = parser.parse_args(arguments)
    quiet_transformers()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return run(options.out.resolve(), device, options.settings)
    except (OSError, sparsify.SparsifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: start again for a whole run", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
