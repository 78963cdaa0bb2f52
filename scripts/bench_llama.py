"""A model of Llama-3.1-8B's shape with block-sparse MLPs against the dense one: decoding, prefill, memory.

Prerequisite: a CUDA GPU with 40 GB, and this package installed or on the path. Nothing is downloaded: the architecture
is transformers' own, weights and masks are random. The command behind docs/benchmarks:

    python scripts/bench_llama.py --out docs/benchmarks

`--only decode,prefill,memory` picks parts, `--layers 4` is quicker, `--decode-blocks 64x64,128x16` adds block shapes.
Dense and sparse model share embeddings and attention, and differ in their MLPs alone. Both are compiled
(`torch.compile`, layer by layer: the layers share their code) and replayed as CUDA graphs, in turns, the L2 cache
emptied before each. A decoding step is embedding, all layers with a static cache of keys and values, head and choice of
the next token, for one sequence; a prefill ends with the last token's logits. Correctness comes first: two layers,
compiled, against the same with dense weights, uncompiled; if they differ, there is no number.

`bound` is the speed-up that the bytes of a decoding step (kept weights, each read once) or the arithmetic of a prefill
would allow.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from sparsify import BlockMask, BlockShape, BlockSparseLinear, fuse, measure
from sparsify.bench import agreement
from sparsify.bench.timing import race

PARTS = ("memory", "decode", "prefill")
BACKEND = "inductor"
# Tokens that one timed call decodes: so many that the time to start a graph does not count.
TOKENS_A_CALL = 8
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def llama_8b(layers: int) -> LlamaConfig:
    """The sizes of Llama-3.1-8B, with another number of layers."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters=rope, tie_word_embeddings=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What the MLPs of a model are: dense, or so sparse in blocks of this shape."""

    block: str | None = None
    sparsity: float = 0.0

    def __str__(self) -> str:
        return "dense" if self.block is None else f"{self.block}, {self.sparsity:.0%}"


class Cache:
    """Keys and values of one layer, of fixed length; the model's attention calls `update`."""

    def __init__(self, config: LlamaConfig, position: Tensor, length: int, dtype: torch.dtype) -> None:
        shape: Any = (1, config.num_key_value_heads, length, config.head_dim)
        self.position = position
        self.keys, self.values = torch.randn(2, *shape, device=position.device, dtype=dtype)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes one token's keys and values at the position; returns all."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of a single token, all heads of a group in one product; of more tokens transformers' own.

    torch's fused attention gives one token's head to one multiprocessor, which walks all keys: most of the GPU idles.
    """
    batch, heads, tokens, size = query.shape
    if tokens > 1 or attention_mask is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    groups = batch * key.shape[1]
    scores = query.reshape(groups, -1, size) @ key.reshape(groups, -1, size).transpose(1, 2)
    scores = scores.float() * size**-0.5
    scores = scores.masked_fill(~attention_mask.view(1, 1, -1), float("-inf"))
    mixed = scores.softmax(-1).to(value.dtype) @ value.reshape(groups, -1, size)
    return mixed.view(batch, tokens, heads, size), None


AttentionInterface.register("one_token", _attention)


def _layer(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor], cache: Any
) -> Tensor:
    return layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache)


def backbone(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model without its MLPs."""
    small = copy.deepcopy(config)
    small.intermediate_size = 8
    with torch.device(device):
        model = LlamaForCausalLM._from_config(small, dtype=dtype, attn_implementation="one_token")
    for layer in model.model.layers:
        # Each layer has a cache of its own, so that all are the same code for the compiler.
        layer.self_attn.layer_idx = 0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        layer.mlp = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model.eval().requires_grad_(False)


def make_mlps(model: LlamaForCausalLM, config: LlamaConfig, variant: Variant) -> list[nn.Module]:
    """Random MLPs, one a layer; every projection keeps the same number of blocks, in random places."""
    device, dtype = model.device, model.dtype
    mlps: list[nn.Module] = []
    for _ in model.model.layers:
        with torch.device("meta"):
            mlp = LlamaMLP(config)
        for name in PROJECTIONS:
            empty: Any = mlp.get_submodule(name)
            sizes = (empty.in_features, empty.out_features)
            if variant.block is None:
                setattr(mlp, name, nn.Linear(*sizes, bias=False, device=device, dtype=dtype))
                continue
            block = BlockShape.parse(variant.block)
            keep = torch.zeros(block.grid(sizes[::-1]), dtype=torch.bool)
            kept = round(keep.numel() * (1 - variant.sparsity))
            keep.view(-1)[torch.randperm(keep.numel())[:kept]] = True
            mask = BlockMask(keep, sizes[::-1], block)
            setattr(mlp, name, BlockSparseLinear(*sizes, block, mask, bias=False, device=device, dtype=dtype))
        mlps.append(mlp)
    fuse(nn.ModuleList(mlps).eval().requires_grad_(False))
    return mlps


def dense_mlps(mlps: Sequence[nn.Module]) -> list[nn.Module]:
    """The same MLPs with dense weights, zeros where no block is stored."""
    twins = []
    for mlp in mlps:
        projections = {name: mlp.get_submodule(name) for name in PROJECTIONS}
        twins.append(copy.deepcopy(mlp, {id(sparse): sparse.to_linear() for sparse in projections.values()}))  # pyright: ignore[reportCallIssue]
    return twins


class Stack:
    """Some layers of the model with certain MLPs, ready to run.

    Args:
        model: What `backbone` made.
        mlps: MLPs of the first layers; there are as many layers as MLPs.
        run: `_layer`, compiled or not.
    """

    def __init__(
        self, model: LlamaForCausalLM, mlps: Sequence[nn.Module], run: Callable[..., Tensor]
    ) -> None:
        self.model, self.run = model, run
        self.layers: list[nn.Module] = []
        for layer, mlp in zip(model.model.layers, mlps, strict=False):
            shared = {id(child): child for child in layer.children()}
            self.layers.append(copy.deepcopy(layer, shared | {id(layer.mlp): mlp}))
        self.caches: list[Cache] = []

    def prepare(self, context: int, length: int) -> None:
        """Fills caches of `length` tokens at random and places the next token after `context`."""
        device, dtype = self.model.device, self.model.dtype
        self.position = torch.full((1,), context, device=device)
        self.token = torch.ones(1, 1, dtype=torch.int64, device=device)
        self.places = torch.arange(length, device=device)
        self.caches = [Cache(self.model.config, self.position, length, dtype) for _ in self.layers]  # pyright: ignore[reportArgumentType]

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embedding, and what the last layer makes of it."""
        embedded = self.model.model.embed_tokens(tokens)
        rope = self.model.model.rotary_emb(embedded, position_ids=positions)
        hidden = embedded
        for layer, cache in zip(self.layers, self.caches or [None] * len(self.layers), strict=True):
            hidden = self.run(layer, hidden, mask, rope, cache)
        return embedded, hidden

    def decode(self) -> tuple[Tensor, Tensor]:
        """One token; the next one takes its place."""
        mask = (self.places <= self.position)[None, None, None]
        embedded, hidden = self.hidden(self.token, self.position[None], mask)
        logits = self.model.lm_head(self.model.model.norm(hidden))
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1
        return embedded, hidden

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of one sequence, up to the last one's logits."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        embedded, hidden = self.hidden(tokens, positions, None)
        self.model.lm_head(self.model.model.norm(hidden[:, -1:]))
        return embedded, hidden


class Bench:
    """The model, what it is measured with, and the rows so far."""

    def __init__(self, config: LlamaConfig, arguments: argparse.Namespace) -> None:
        self.config, self.arguments = config, arguments
        self.device, self.dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        # One set of compiled code for each variant and each number of tokens.
        torch._dynamo.config.recompile_limit = 64
        self.run = (
            _layer
            if arguments.eager
            else torch.compile(_layer, fullgraph=True, dynamic=False, backend=BACKEND)
        )
        self.model = backbone(config, self.device, self.dtype)
        self.rows: list[dict[str, Any]] = []

    def add(self, part: str, variant: Variant, **figures: Any) -> None:
        """Keeps and prints a row."""
        row = {"part": part, "mlp": str(variant), "block": variant.block, "sparsity": variant.sparsity}
        self.rows.append(row | figures)
        said = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in figures.items()
        )
        print(f"{part:8} {variant!s:14} {', '.join(said)}", flush=True)

    def memory(self, variants: Sequence[Variant]) -> None:
        """Bytes in memory of the whole model, before and after its first use, against those of what it keeps."""
        config, base = self.config, _bytes(self.model)
        dense = (
            3 * config.num_hidden_layers * config.hidden_size * config.intermediate_size * self.dtype.itemsize
        )
        for variant in variants:
            before = self.allocated()
            mlps = make_mlps(self.model, config, variant)
            loaded = self.allocated()
            kept = base + sum(map(_bytes, mlps))
            for tokens in (1, 512):
                Stack(self.model, mlps, _layer).prefill(
                    torch.ones(1, tokens, dtype=torch.int64, device=self.device)
                )
            figures: dict[str, Any] = {"kept_gb": kept / 1e9, "share_of_dense": kept / (base + dense)}
            if self.device.type == "cuda":
                figures["allocated_over_kept"] = (base + loaded - before) / kept
                figures["after_use_over_kept"] = (base + self.allocated() - before) / kept
            self.add("memory", variant, **figures)
            del mlps

    def allocated(self) -> int:
        """Bytes of GPU memory in use."""
        gc.collect()
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def decode(self, variants: Sequence[Variant]) -> None:
        """Tokens a second of one sequence."""
        context, repeats = self.arguments.context, self.arguments.repeats
        length = context + TOKENS_A_CALL * (repeats + 8)  # a race runs each call some times before it counts
        head = _bytes(self.model) - _bytes(self.model.model.embed_tokens)

        def prepare(stack: Stack) -> None:
            stack.prepare(context, length)

        def call(stack: Stack) -> Callable[[], object]:
            prepare(stack)
            return lambda: [stack.decode() for _ in range(TOKENS_A_CALL)]

        self.compete("decode", variants, prepare, Stack.decode, call, TOKENS_A_CALL, head)

    def prefill(self, variants: Sequence[Variant]) -> None:
        """Tokens a second of one long prompt."""
        tokens = torch.randint(self.config.vocab_size, (1, self.arguments.tokens), device=self.device)
        layers = _bytes(self.model.model.layers)
        self.compete(
            "prefill",
            variants,
            lambda stack: None,
            lambda stack: stack.prefill(tokens),
            lambda stack: lambda: stack.prefill(tokens),
            tokens.shape[1],
            layers,
        )

    def compete(
        self,
        part: str,
        variants: Sequence[Variant],
        prepare: Callable[[Stack], None],
        once: Callable[[Stack], tuple[Tensor, Tensor]],
        call: Callable[[Stack], Callable[[], object]],
        tokens: int,
        fixed: int,
    ) -> None:
        """Checks and times all variants, the first of which is dense.

        Args:
            part: Name of the rows.
            variants: What to compare.
            prepare: Makes a stack ready for `once`.
            once: Runs a stack.
            call: What is timed.
            tokens: Tokens of a timed call.
            fixed: Bytes of the weights that all variants use beside their MLPs.
        """
        calls: dict[str, Callable[[], object]] = {}
        errors, weights = {}, {}
        for variant in variants:
            mlps = make_mlps(self.model, self.config, variant)
            if variant.block is not None:
                errors[variant] = self.check(mlps[:2], prepare, once)
            calls[str(variant)] = call(Stack(self.model, mlps, self.run))
            weights[variant] = fixed + sum(map(_bytes, mlps))
        times = race(calls, self.device, self.arguments.repeats)
        seconds = {variant: times.seconds[str(variant)] / tokens for variant in variants}
        for variant in variants:
            figures = {
                "tokens_per_second": 1 / seconds[variant],
                "call_ms": seconds[variant] * tokens * 1e3,
                "speedup": seconds[variants[0]] / seconds[variant],
                "bound": weights[variants[0]] / weights[variant],
            }
            self.add(part, variant, **figures, error=errors.get(variant, 0.0), timing=times.timing)

    def check(
        self,
        mlps: list[nn.Module],
        prepare: Callable[[Stack], None],
        once: Callable[[Stack], tuple[Tensor, Tensor]],
    ) -> float:
        """Relative error of what the first layers add to the embedding, compiled, against dense weights, uncompiled.

        Raises:
            SparsifyError: If it exceeds the dtype's budget.
        """
        added = []
        for own, run in ((mlps, self.run), (dense_mlps(mlps), _layer)):
            stack = Stack(self.model, own, run)
            torch.manual_seed(1)  # the same keys and values for both
            prepare(stack)
            embedded, hidden = once(stack)
            added.append((hidden.float() - embedded.float()).to(self.dtype))
        return agreement.check_model(added[0], added[1], routed=False)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    environment, rows = record["environment"], record["rows"]
    place = ", ".join([*environment["gpu"], f"torch {environment['versions']['torch']}", record["dtype"]])
    lines = [
        "# A model of Llama-3.1-8B's shape with block-sparse MLPs\n",
        f"`{environment['command']}`\n",
        f"{place}, {record['layers']} layers, random weights and masks, {record['compiled']}; decoding one sequence "
        f"after {record['context']} tokens, prefill of {record['tokens']}. *Bound*: what the bytes of a decoding "
        "step or the arithmetic of a prefill's layers would allow.\n",
        "| part | MLPs | tokens/s | speed-up | bound | error | timing |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["part"] != "memory":
            lines.append(
                f"| {row['part']} | {row['mlp']} | {row['tokens_per_second']:.1f} | **{row['speedup']:.2f}** | "
                f"{row['bound']:.2f} | {row['error']:.1e} | {row['timing']} |"
            )
    lines += [
        "",
        "| MLPs | kept GB | of dense | allocated / kept | after use / kept |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["part"] == "memory":
            ratios = (row.get("allocated_over_kept"), row.get("after_use_over_kept"))
            said = " | ".join("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
            lines.append(f"| {row['mlp']} | {row['kept_gb']:.2f} | {row['share_of_dense']:.1%} | {said} |")
    return "\n".join(lines) + "\n"


def write(bench: Bench, seconds: float) -> None:
    """JSON and a table, named after the GPU."""
    arguments, out = bench.arguments, bench.arguments.out
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    name = "llama-8b-" + gpu.lower().replace("nvidia", "").strip().replace(" ", "-")
    record = {
        "environment": measure.environment(),
        "layers": bench.config.num_hidden_layers,
        "hidden_size": bench.config.hidden_size,
        "intermediate_size": bench.config.intermediate_size,
        "dtype": arguments.dtype,
        "compiled": "not compiled" if arguments.eager else "compiled",
        "context": arguments.context,
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "seconds": round(seconds, 1),
        "rows": bench.rows,
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(record))
    print(f"written: {out / name}.json, .md")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"comma-separated parts (default: {','.join(PARTS)})"
    )
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--decode-blocks", default="64x64", help="block shapes of the MLPs in decoding")
    parser.add_argument(
        "--prefill-blocks", default="128x128,64x64", help="block shapes of the MLPs in prefill"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens before those that are decoded")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prefill")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each model")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for JSON and table")
    arguments = parser.parse_args(argv)
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}: choose from {','.join(PARTS)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here; `--device cpu --layers 1` tries the program out, slowly")
    begin = time.perf_counter()
    torch.manual_seed(0)
    decode = [
        Variant(block, sparsity) for block in arguments.decode_blocks.split(",") for sparsity in (0.5, 0.9)
    ]
    prefill = [Variant(block, 0.75) for block in arguments.prefill_blocks.split(",")]
    with torch.no_grad():
        bench = Bench(llama_8b(arguments.layers), arguments)
        if "memory" in parts:
            bench.memory([Variant(), *decode])
        if "decode" in parts:
            bench.decode([Variant(), *decode])
        if "prefill" in parts:
            bench.prefill([Variant(), *prefill])
    write(bench, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
