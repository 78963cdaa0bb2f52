"""Fine-tuning packed blocks against fine-tuning dense weights, at the sizes of Llama-3.2-1B: time and memory of a step.

Prerequisite: a CUDA GPU with 80 GB, and this package installed or on the path. Nothing is downloaded: the architecture
is transformers' own, weights and masks are random. The command behind docs/benchmarks:

    python scripts/bench_healing.py --out docs/benchmarks

A step is a forward pass with the loss, the backward pass and an update by AdamW (fused), as the Trainer does it:
`mixed` keeps weights and optimizer state in float32 and multiplies in bfloat16 (what a recipe's `finetune` stage does),
`bfloat16` keeps all in bfloat16. All linear layers of the blocks are pruned; embeddings and head are dense everywhere.
`dense` is ordinary fine-tuning, `masked` trains dense weights under the mask (`heal: masked`), `packed` the stored
blocks alone (`heal: packed`). Before anything is timed, loss and gradients of packed and masked are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import masking, measure

FORMS = ("dense", "masked", "packed")
PRECISIONS = ("mixed", "bfloat16")
WARMUP = 3
VOCAB = 128_256
# Largest relative difference of the losses, and of the gradients (Frobenius norms), of packed and masked.
BUDGET = {"loss": 2e-3, "gradient": 3e-2}


def llama_1b(layers: int) -> LlamaConfig:
    """The sizes of Llama-3.2-1B, with another number of layers."""
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


class Bench:
    """One dense model, from which all others are made, and a batch of random tokens."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        torch.manual_seed(0)
        with self.device:
            self.model = LlamaForCausalLM(llama_1b(arguments.layers))
            self.tokens = torch.randint(VOCAB, (arguments.batch, arguments.length))
        self.rows: list[dict[str, Any]] = []

    def make(self, form: str, precision: str, block: str, sparsity: float) -> Any:
        """A model in one form, with the same weights and masks as in the others."""
        model = copy.deepcopy(self.model)
        if form != "dense":
            options: dict[str, Any] = {"method": "balanced_random", "block": block, "sparsity": sparsity}
            result = sparsify.prune(model, convert=form == "packed", **options)
            if form == "masked":
                masking.mask_model(model, result.masks, dense_gradient=False)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        return nn.Module.to(model, dtype).train()

    def loss(self, model: Any, precision: str) -> Tensor:
        """The loss of the batch."""
        mixed = (
            torch.autocast(self.device.type, torch.bfloat16)
            if precision == "mixed"
            else contextlib.nullcontext()
        )
        with mixed:
            return model(input_ids=self.tokens, labels=self.tokens).loss

    def check(self, precision: str, block: str, sparsity: float) -> dict[str, float]:
        """Relative differences of packed and masked.

        Raises:
            SparsifyError: If they are too large.
        """
        masked, packed = (self.make(form, precision, block, sparsity) for form in ("masked", "packed"))
        losses = [self.loss(model, precision) for model in (masked, packed)]
        for loss in losses:
            loss.backward()
        found = {"loss": abs(losses[0].item() / losses[1].item() - 1), "gradient": 0.0}
        for name, mask in sparsify.masks_of(packed).items():
            gradient = masked.get_submodule(name).weight.grad
            expected = sparsify.BlockSparseLinear.from_linear(_linear(gradient), mask).weight.float()
            difference = packed.get_submodule(name).weight.grad.float() - expected
            found["gradient"] = max(found["gradient"], (difference.norm() / expected.norm()).item())
        if any(not value <= BUDGET[name] for name, value in found.items()):
            raise sparsify.SparsifyError(
                f"packed and masked differ ({block}, {sparsity:.0%}, {precision}): {found}"
            )
        return found

    def time(self, form: str, precision: str, block: str, sparsity: float) -> dict[str, float]:
        """Median seconds and peak bytes of a step."""
        model = self.make(form, precision, block, sparsity)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            self.loss(model, precision).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(WARMUP):
            step()
        gc.collect()
        on_gpu = self.device.type == "cuda"
        others = sum(parameter.nbytes for parameter in self.model.parameters())
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = [_timed(step, on_gpu) for _ in range(self.arguments.repeats)]
        peak = torch.cuda.max_memory_allocated(self.device) - others if on_gpu else 0
        state = [
            value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)
        ]
        kept = 2 * sum(parameter.nbytes for parameter in model.parameters()) + sum(
            value.nbytes for value in state
        )
        return {"seconds": statistics.median(seconds), "peak_bytes": peak, "weight_bytes": kept}

    def run(self, precision: str, blocks: Sequence[str], sparsities: Sequence[float]) -> None:
        """All rows of one precision."""
        dense = self.add({}, "dense", precision, "", 0.0)
        for block in blocks:
            for sparsity in sparsities:
                errors = self.check(precision, block, sparsity)
                for form in FORMS[1:]:
                    self.add(errors, form, precision, block, sparsity, dense)

    def add(
        self,
        errors: dict[str, float],
        form: str,
        precision: str,
        block: str,
        sparsity: float,
        dense: Any = None,
    ) -> dict[str, Any]:
        """Measures, keeps and prints one row."""
        gc.collect()
        row: dict[str, Any] = {"form": form, "precision": precision, "block": block, "sparsity": sparsity}
        row |= self.time(form, precision, block, sparsity)
        row |= {"speedup": (dense or row)["seconds"] / row["seconds"], "errors": errors}
        self.rows.append(row)
        print(
            f"{precision:9} {form:7} {block:8} {sparsity:4.0%}  {row['seconds'] * 1e3:7.1f} ms  "
            f"{row['speedup']:.2f}x  peak {row['peak_bytes'] / 1e9:.1f} GB  "
            f"weights, gradients, state {row['weight_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        return row


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _timed(step: Callable[[], None], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    environment = record["environment"]
    place = ", ".join([*environment["gpu"], f"torch {environment['versions']['torch']}"])
    lines = [
        "# Healing packed blocks against dense fine-tuning, Llama-3.2-1B's sizes\n",
        f"`{environment['command']}`\n",
        f"{place}; {record['layers']} layers, {record['batch']} sequences of {record['length']} tokens, random weights "
        "and masks in all linear layers of the blocks; a step is forward, backward and AdamW, median of "
        f"{record['repeats']}. *Held* is weights, gradients and optimizer state of the whole model, embeddings "
        "included; *peak* adds activations. *Error*: of the gradients of the stored blocks, against masked.\n",
        "| precision | form | blocks | removed | step ms | speed-up | held GB | peak GB | error |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        error = f"{row['errors']['gradient']:.0e}" if row["errors"] else ""
        lines.append(
            f"| {row['precision']} | {row['form']} | {row['block']} | {row['sparsity']:.0%} | "
            f"{row['seconds'] * 1e3:.1f} | {row['speedup']:.2f} | {row['weight_bytes'] / 1e9:.2f} | "
            f"{row['peak_bytes'] / 1e9:.1f} | {error} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", default="64x64,128x16,128x128", help="block shapes, with commas")
    parser.add_argument("--sparsities", default="0.5,0.75,0.9", help="removed shares, with commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="of mixed and bfloat16")
    parser.add_argument("--layers", type=int, default=16, help="layers of the model")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for JSON and table")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here; `--device cpu --layers 1` tries the program out, slowly")
    bench = Bench(arguments)
    for precision in arguments.precisions.split(","):
        bench.run(precision, arguments.blocks.split(","), [float(s) for s in arguments.sparsities.split(",")])
    shown = {name: getattr(arguments, name) for name in ("layers", "batch", "length", "repeats")}
    record = {"environment": measure.environment(), **shown, "rows": bench.rows}
    gpu = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    name = "healing-" + gpu.lower().replace("nvidia", "").strip().replace(" ", "-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(table(record))
    print(f"written: {arguments.out / name}.json, .md")


if __name__ == "__main__":
    main()
