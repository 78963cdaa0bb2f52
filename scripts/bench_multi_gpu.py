"""One GPU against two: tensor parallelism, DDP and FSDP2, dense beside block-sparse, at the sizes of Llama models.

Prerequisite: two CUDA GPUs of 80 GB, and this package installed or on the path. Nothing is downloaded: the architecture
is transformers' own, weights and masks are random. The command behind docs/benchmarks, about three minutes:

    torchrun --standalone --nproc-per-node 2 scripts/bench_multi_gpu.py --out docs/benchmarks

`prefill` is a forward pass over whole sequences; `decode` one token of each of several sequences without a past, which
reads all weights as decoding does, as a CUDA graph with its collectives in it; `train` forward, backward and AdamW, all
in bfloat16. With tensor parallelism (`tp`) both GPUs work on every sequence, with `ddp` and `fsdp2` each on its half of
the same number of sequences, so that two GPUs at their best take half the time of `one`. Before anything is timed, two
GPUs have to give what one gives: the logits, and the losses of three training steps.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from bench_rows import write_pages
from sparsify import measure

# Llama-3.2-1B and Llama-3.1-8B: hidden, intermediate, heads, head dimension, tied; layers measured of 16 and 32.
SHAPES: dict[str, tuple[int, int, int, int, bool, int]] = {
    "1B": (2048, 8192, 32, 64, True, 16),
    "8B": (4096, 14336, 32, 128, False, 8),
}
VOCAB = 32_768
BLOCK, SPARSITY = "64x64", 0.75
WARMUP = 3
CHECKED_STEPS = 3
# Largest relative difference of two GPUs and one: of the logits (Frobenius norm), and of the losses.
BUDGET = {torch.bfloat16: {"logits": 2e-2, "loss": 5e-3}, torch.float32: {"logits": 1e-4, "loss": 1e-4}}


def config(shape: str, layers: int = 0) -> LlamaConfig:
    """The sizes of one model, with fewer layers and tokens."""
    hidden, intermediate, heads, width, tied, own_layers = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or own_layers,
        num_attention_heads=heads, num_key_value_heads=max(2, heads // 4), head_dim=width, rms_norm_eps=1e-5,
        max_position_embeddings=8192, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip


class Different(Exception):
    """Several GPUs do not give what one gives."""


class Bench:
    """One process of the benchmark; all measure alike, and the first one writes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.on_gpu = arguments.device == "cuda"
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")
        )
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.mesh = init_device_mesh(self.device.type, (self.ranks,), mesh_dim_names=("tp",))
        self.rows: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.environment = measure.environment()
        self.held = 0

    def models(self, shape: str) -> dict[str, Any]:
        """The dense model and the sparse one, the same on every process."""
        torch.manual_seed(0)
        with self.device:
            dense = LlamaForCausalLM(config(shape, self.arguments.layers)).to(self.dtype)  # pyright: ignore
        sparse = copy.deepcopy(dense)
        sparsify.prune(sparse, method="random_blocks", block=BLOCK, sparsity=SPARSITY)
        return {"dense": dense.eval(), "sparse": sparse.eval()}

    def tokens(self, sequences: int, length: int) -> Tensor:
        """Random tokens, the same on every process."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(VOCAB, (sequences, length), generator=generator).to(self.device)

    def divided(self, model: Any, mode: str) -> Any:
        """A copy of a model as one mode has it."""
        model = copy.deepcopy(model)
        if mode == "tp":
            sparsify.parallelize(model, self.mesh)
        elif mode == "ddp":
            return DistributedDataParallel(model, device_ids=[self.device] if self.on_gpu else None)
        elif mode == "fsdp2":
            for layer in model.model.layers:
                fully_shard(layer, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)
        return model

    def inference(self, shape: str, form: str, whole: Any, mode: str) -> None:
        """The rows of prefill and decode."""
        model = self.divided(whole, mode)
        batch, length = self.arguments.prefill
        tokens = self.tokens(batch, length)
        with torch.no_grad():
            error = self.checked("logits", model(input_ids=tokens).logits, whole(input_ids=tokens).logits)
            row = {"shape": shape, "form": form, "mode": mode, "error": error}
            self.add(
                {**row, "work": f"prefill {batch}x{length}", "tokens": tokens.numel()},
                lambda: model(input_ids=tokens),
            )
            for sequences in self.arguments.decode:
                step, how = self.graph(model, self.tokens(sequences, 1))
                self.add({**row, "work": f"decode {sequences}{how}", "tokens": sequences}, step)

    def graph(self, model: Any, tokens: Tensor) -> tuple[Callable[[], Any], str]:
        """A forward pass as a CUDA graph; on the CPU itself, and it says so."""
        if not self.on_gpu:
            return lambda: model(input_ids=tokens), " (no graph)"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                model(input_ids=tokens)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Another thread of NCCL's may look at its events while this one records.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            model(input_ids=tokens)
        return graph.replay, ""

    def training(self, shape: str, form: str, whole: Any, modes: Sequence[str]) -> None:
        """The rows of training, `one` first: the others have to come to its losses."""
        sequences, length = self.arguments.train
        tokens = self.tokens(sequences, length)
        expected: list[float] = []

        def measured(mode: str) -> None:
            nonlocal expected
            model = self.divided(whole, mode).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.on_gpu)
            own = tokens.chunk(self.ranks)[self.rank] if mode in ("ddp", "fsdp2") else tokens

            def step(model: Any = model, optimizer: Any = optimizer, own: Tensor = own) -> Tensor:
                loss = model(input_ids=own, labels=own).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return loss.detach()

            losses = torch.stack([step() for _ in range(CHECKED_STEPS)]).double()
            if mode in ("ddp", "fsdp2"):
                distributed.all_reduce(losses)
                losses /= self.ranks
            expected = expected or losses.tolist()
            error = self.checked(
                "loss", losses, torch.tensor(expected, device=self.device, dtype=torch.float64)
            )
            row = {"shape": shape, "form": form, "mode": mode, "error": error}
            self.add({**row, "work": f"train {sequences}x{length}", "tokens": tokens.numel()}, step)

        for mode in modes:
            self.attempt(f"{shape} {form} {mode}", lambda mode=mode: measured(mode))

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Measures something, and goes on to the next if it is wrong."""
        try:
            work()
        except Different as error:
            self.faults.append(f"{name}: {error}")
            if self.rank == 0:
                print(f"error: {self.faults[-1]}; no time is given", file=sys.stderr, flush=True)
        gc.collect()

    def checked(self, what: str, got: Tensor, expected: Tensor) -> float:
        """Relative difference of what one mode gives, the largest of all processes.

        Raises:
            Different: If it is too large, on all processes.
        """
        got, expected = got.float(), expected.float()
        error = ((got - expected).norm() / expected.norm()).reshape(1)
        distributed.all_reduce(error, op=distributed.ReduceOp.MAX)
        if not error.item() <= BUDGET[self.dtype][what]:
            raise Different(f"several GPUs and one differ: {what} by {error.item():.1e}")
        return error.item()

    def add(self, row: dict[str, Any], call: Callable[[], Any]) -> None:
        """Times a call, the slowest process's, and keeps and prints the row."""
        for _ in range(WARMUP):
            call()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.arguments.repeats):
            distributed.barrier()
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        # What the models held beside the one that is measured take is not its own.
        peak = torch.cuda.max_memory_allocated() - self.held if self.on_gpu else 0
        told = torch.tensor([statistics.median(seconds), peak], dtype=torch.float64, device=self.device)
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
        row |= {
            "gpus": 1 if row["mode"] == "one" else self.ranks,
            "seconds": told[0].item(),
            "peak_bytes": told[1].item(),
        }
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        self.rows.append(row)
        if self.rank == 0:
            self.write()
            print(
                f"{row['shape']} {row['form']:6} {row['work']:22} {row['mode']:5} {row['seconds'] * 1e3:8.2f} ms "
                f"{row['tokens_per_second']:12,.0f} tokens/s  peak {row['peak_bytes'] / 1e9:.1f} GB  "
                f"error {row['error']:.0e}",
                flush=True,
            )

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def run(self) -> None:
        """All rows."""
        for shape in self.arguments.shapes:
            models = self.models(shape)
            for form, model in models.items():
                self.held = sum(p.nbytes for each in models.values() for p in each.parameters())
                for mode in ("one", "tp"):
                    self.attempt(f"{shape} {form} {mode}", partial(self.inference, shape, form, model, mode))
                self.training(shape, form, model, ("one", "tp", "ddp", "fsdp2"))
            del models, model
            gc.collect()

    def write(self) -> None:
        """Writes the rows so far, as JSON and as a table."""
        compared(self.rows)
        layers = {shape: self.arguments.layers or SHAPES[shape][-1] for shape in self.arguments.shapes}
        record = {"environment": self.environment, "processes": self.ranks, "layers": layers}
        record |= {"repeats": self.arguments.repeats, "rows": self.rows}
        write_pages(self.arguments.out, "multi-gpu", record, table(record))


def compared(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to each row how much faster it is than one GPU, and than dense with as many GPUs in the same way.

    `None` where there is no such row.
    """
    found = {(row["shape"], row["work"], row["form"], row["mode"]): row["seconds"] for row in rows}
    for row in rows:
        for name, form, mode in (("scaling", row["form"], "one"), ("over_dense", "dense", row["mode"])):
            other = found.get((row["shape"], row["work"], form, mode))
            row[name] = None if other is None else other / row["seconds"]


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    environment = record["environment"]
    place = ", ".join([*environment["gpu"], f"torch {environment['versions']['torch']}"])
    layers = ", ".join(f"{shape}: {count}" for shape, count in record["layers"].items())
    lines = [
        "# One GPU and several\n",
        f"`{environment['command']}`\n",
        f"{place}; {record['processes']} processes. Llama shapes of random weights (layers {layers}; vocabulary "
        f"{VOCAB:,}), bfloat16 on GPUs; sparse: {SPARSITY:.0%} of the layers' linear weights removed at random in "
        f"{BLOCK}. Median of {record['repeats']}, the slowest process; the same sequences in all modes. *Scaling*: "
        "against one GPU; *over dense*: against the dense model in the same mode. *Peak*: of one GPU. *Error*: against "
        "one GPU, of the logits or of the losses of three steps.\n",
        "| model | form | work | mode | GPUs | ms | tokens/s | scaling | over dense | peak GB | error |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['shape']} | {row['form']} | {row['work']} | {row['mode']} | {row['gpus']} | "
        f"{row['seconds'] * 1e3:.2f} | "
        f"{row['tokens_per_second']:,.0f} | {_ratio(row['scaling'])} | {_ratio(row['over_dense'])} | "
        f"{row['peak_bytes'] / 1e9:.1f} | {row['error']:.0e} |"
        for row in record["rows"]
    ]
    return "\n".join(lines) + "\n"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _pair(text: str) -> tuple[int, int]:
    sequences, length = text.split("x")
    return int(sequences), int(length)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="layers of each model (default: 16 and 8)")
    parser.add_argument("--prefill", type=_pair, default=(2, 4096), help="sequences x tokens")
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 16], help="sequences, one token each")
    parser.add_argument(
        "--train", type=_pair, default=(8, 1024), help="sequences x tokens of a step, of all GPUs"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed calls")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for JSON and table")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        sys.exit("error: start it with torchrun --standalone --nproc-per-node 2 scripts/bench_multi_gpu.py")
    if arguments.device == "cuda":
        if torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
            sys.exit(
                "error: fewer GPUs here than processes; `--device cpu --layers 1` tries the program out, slowly"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, timeout = ("nccl" if arguments.device == "cuda" else "gloo"), timedelta(minutes=5)
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else None
    distributed.init_process_group(backend, timeout=timeout, device_id=device)
    bench = Bench(arguments)
    bench.run()
    distributed.barrier()
    distributed.destroy_process_group()
    if bench.faults:
        sys.exit("error: " + "; ".join(bench.faults))


if __name__ == "__main__":
    main()
