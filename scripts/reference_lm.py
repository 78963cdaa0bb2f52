"""Train the language model that pruners are compared on: a Llama of 19.4M parameters that has read classic books.

Prerequisite: a folder of archives, `books-train-*.tar.xz` and `books-valid.tar.xz`, of Markdown files, one a book,
whose header ends at a line `-------`; for --wikitext the plain text of WikiText-2 valid. The command that makes the
checkpoint (minutes on a GPU, days on a CPU):

    python scripts/reference_lm.py --books path/to/classic-books --wikitext path/to/valid.txt.xz --out build/reference

Its byte-level BPE tokenizer of 16,384 tokens is fitted to the training books. Books are packed into blocks of 512
tokens with an end token after each book, and every perplexity is per token of this tokenizer. Two trainings on a GPU
differ by rounding, so tables name the SHA-256 of the `model.safetensors` that they used; the command prints it.
For a quick look: `--max-books 2 --steps 5 --batch 4`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing comes from a hub

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import sparsify
from sparsify import measure, quality
from sparsify.cli.console import quiet_transformers
from sparsify.data import spec as data

VOCABULARY = 16_384
LENGTH = 512  # tokens a block
PARAMETER_LIMIT = 20_000_000
END = "<|endoftext|>"  # token 0
HEADER_END = "\n-------\n"
COMMAND = (
    "python scripts/reference_lm.py --books path/to/classic-books --wikitext path/to/valid.txt.xz "
    "--out build/reference"
)


@dataclass(frozen=True)
class Settings:
    """Everything besides the text and the architecture that decides the weights.

    Attributes:
        epochs: Passes over the training books.
        steps: Optimizer steps, in place of `epochs`; 0 leaves it to `epochs`.
        batch: Blocks of 512 tokens a step.
        learning_rate: Peak; linear warm-up over the first twentieth, then down to 0 along a cosine.
        weight_decay: AdamW's, on matrices.
        max_books: Books taken from each archive, from its front, for a quick look, which measures on the first 32
            blocks of each text alone; 0 takes all.
        seed: Of the initial weights and the order of blocks.
    """

    epochs: int = 5
    steps: int = 0
    batch: int = 256
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    max_books: int = 0
    seed: int = 0


def read_archive(archive: Path, limit: int = 0) -> list[str]:
    """Texts of the books in one archive, in its order and without their headers.

    Args:
        archive: A `.tar.xz` of Markdown files.
        limit: Most books to take, from the front; 0 takes all.

    Raises:
        ValueError: If a book has no header, or the file is no such archive.
    """
    texts: list[str] = []
    try:
        with tarfile.open(archive, "r:xz") as books:
            for member in books:
                if (file := books.extractfile(member)) is None:
                    continue
                _, found, text = file.read().decode("utf-8").partition(HEADER_END)
                if not found:
                    raise ValueError(f"{archive}: {member.name} has no line `-------` that ends its header")
                texts.append(text.strip("\n"))
                if len(texts) == limit:
                    break
    except (tarfile.TarError, lzma.LZMAError) as error:
        raise ValueError(f"{archive} cannot be read as a .tar.xz archive: {error}") from error
    return texts


def read_books(folder: Path, part: str, limit: int = 0) -> list[str]:
    """Texts of the books in all archives `books-{part}*.tar.xz` of a folder, in the order of the file names.

    Raises:
        FileNotFoundError: If there is no such archive.
        ValueError: As `read_archive`.
    """
    archives = sorted(folder.glob(f"books-{part}*.tar.xz"))
    if not archives:
        raise FileNotFoundError(
            f"{folder} has no books-{part}*.tar.xz; give --books the folder of the archives"
        )
    with ThreadPoolExecutor() as pool:  # decompression leaves the interpreter free
        parts = pool.map(lambda archive: read_archive(archive, limit), archives)
    return [text for texts in parts for text in texts]


def read_text(path: Path) -> str:
    """A plain text file, also one compressed as `.xz`, as it stands."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        try:
            content = lzma.decompress(content)
        except lzma.LZMAError as error:
            raise ValueError(f"{path} cannot be read as an .xz file: {error}") from error
    return content.decode("utf-8")


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE tokenizer; any UTF-8 text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    """Build the untrained model: width 512, 4 layers, 8 query and 4 key-value heads of 64, tied embeddings.

    Raises:
        ValueError: If it has 20M parameters or more.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if model.num_parameters() >= PARAMETER_LIMIT:
        raise ValueError(f"{model.num_parameters():,} parameters; the limit is {PARAMETER_LIMIT:,}")
    return model


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Tokens of all texts, an end token after each, cut into blocks: uint16 ``(blocks, 512)``, the rest dropped.

    Raises:
        ValueError: If the texts do not fill one block.
    """
    backend = tokenizer.backend_tokenizer
    parts: list[np.ndarray] = []
    # Some dozens of books at once occupy all cores; more would only take memory.
    for start in range(0, len(texts), 64):
        for encoded in backend.encode_batch_fast(texts[start : start + 64], add_special_tokens=False):
            parts.append(np.array([*encoded.ids, 0], dtype=np.uint16))
    tokens = np.concatenate(parts)
    if len(tokens) < LENGTH:
        raise ValueError(f"the books hold {len(tokens)} tokens; at least one block of {LENGTH} is needed")
    return tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def held_out_blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, most: int | None = None) -> Dataset:
    """At most `most` blocks for `sparsify.quality.perplexity`: those that a folder of one `.txt` a text would give."""
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            (Path(folder) / f"{number:04}.txt").write_text(text, encoding="utf-8", newline="\n")
        return data.causal_blocks(data.DataSpec(path=folder, length=LENGTH, samples=most), tokenizer)


class Rows(torch.utils.data.Dataset):
    """Blocks as training samples; the tokens stay in one array of 16-bit numbers."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.blocks[index]


def collate(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of rows as int64 `input_ids` and `labels`, each ``(batch, 512)``."""
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}


class Curve(TrainerCallback):
    """Measure the validation loss at each tenth of the run, and keep it with the training loss of that tenth."""

    def __init__(self, validation: Dataset):
        self.validation = validation
        self.points: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, model=None, **_):
        """Add a point where the Trainer reports its mean loss since the last report."""
        if model is None or not logs or "loss" not in logs:
            return
        valid = quality.perplexity(model, self.validation, batch=32)["loss"]
        loss = float(logs["loss"])
        self.points.append({"step": state.global_step, "train_loss": loss, "valid_loss": valid})
        print(f"step {state.global_step}: loss {loss:.4f}, books-valid {valid:.4f} nats a token", flush=True)


def train(
    model: LlamaForCausalLM, blocks: np.ndarray, validation: Dataset, settings: Settings, device: str
) -> list[dict[str, float]]:
    """Train in place with the Hugging Face `Trainer`; on a GPU compiled, under bfloat16 autocast.

    Returns:
        Points of `step`, `train_loss` (mean since the last point) and `valid_loss`, in nats a token.

    Raises:
        ValueError: If the blocks do not fill one batch.
    """
    if len(blocks) < settings.batch:
        raise ValueError(f"{len(blocks)} blocks do not fill a batch of {settings.batch}; lower --batch")
    steps = settings.steps or settings.epochs * (len(blocks) // settings.batch)
    # Compiled, transformers' own "sdpa" writes out a mask although all rows are full, which rules out the flash
    # kernel. For a name that it has no mask for, it makes none, and the attention is causal.
    AttentionInterface.register("causal", sdpa_attention_forward)
    model.set_attn_implementation("causal")
    curve = Curve(validation)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=settings.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            seed=settings.seed,
            bf16=device == "cuda",
            torch_compile=device == "cuda",
            use_cpu=device == "cpu",
            dataloader_drop_last=True,  # one shape, compiled once
            remove_unused_columns=False,
            logging_steps=max(1, steps // 10),
            logging_nan_inf_filter=False,  # it would wait for the GPU in each step
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(blocks), data_collator=collate)
        trainer.remove_callback(PrinterCallback)  # the curve prints the same loss
        trainer.add_callback(curve)
        trainer.train()
    return curve.points


def sha256(checkpoint: Path) -> str:
    """SHA-256 of the checkpoint's `model.safetensors`, by which tables name it."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def build(settings: Settings, books: Path, wikitext: Path | None, out: Path, device: str) -> dict[str, Any]:
    """Train, save and measure the model.

    Args:
        settings: See `Settings`.
        books: Folder of the archives.
        wikitext: Plain text to measure on as well, or None.
        out: Folder of the checkpoint, which also gets `training.json`.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        What `training.json` holds. Losses and perplexities under `quality` are those of the saved bfloat16 weights,
        computed in float32; `train` is measured on blocks of the training books, evenly spread, at most as many as of
        `books-valid`.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If a text is not as described above.
    """
    started = time.monotonic()
    valid_texts = read_books(books, "valid", settings.max_books)
    texts = read_books(books, "train", settings.max_books)
    other = [read_text(wikitext)] if wikitext else []
    characters = sum(map(len, texts))
    print(f"{len(texts)} books, {characters:,} characters, {time.monotonic() - started:.0f} s", flush=True)
    tokenizer = make_tokenizer(texts)
    print(f"tokenizer of {len(tokenizer):,} tokens, {time.monotonic() - started:.0f} s", flush=True)
    blocks = pack(texts, tokenizer)
    most = 32 if settings.max_books else None
    held_out = {"books-valid": held_out_blocks(valid_texts, tokenizer, most)}
    if other:
        held_out["wikitext-2-valid"] = held_out_blocks(other, tokenizer, most)
    set_seed(settings.seed)
    model = make_model()
    parameters = model.num_parameters()
    print(
        f"{parameters:,} parameters, {blocks.size:,} training tokens, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    training_started = time.monotonic()
    curve = train(model, blocks, held_out["books-valid"], settings, device)
    training_seconds = time.monotonic() - training_started

    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = torch.nn.Module.to(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), device)
    sample = blocks[:: max(1, -(-len(blocks) // len(held_out["books-valid"])))]
    seen = Dataset.from_dict({"input_ids": sample.tolist()}).with_format("torch")
    results = {
        part: quality.perplexity(saved, dataset, batch=32)
        for part, dataset in {"train": seen, **held_out}.items()
    }
    environment = measure.environment()
    del environment["command"]  # the command in the report names no one's paths
    report = {
        "command": COMMAND,
        "settings": asdict(settings),
        "environment": environment,
        "parameters": parameters,
        "books": len(texts),
        "training_tokens": blocks.size,
        "steps": curve[-1]["step"],
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "curve": curve,
        "quality": results,
        "sha256": sha256(out),
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; each field of `Settings` is an option."""
    parser = argparse.ArgumentParser(description="Train the reference language model on classic books.")
    parser.add_argument("--books", type=Path, required=True, help="folder of books-*.tar.xz")
    parser.add_argument("--wikitext", type=Path, help="plain text (.txt or .txt.xz) to measure on as well")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name, value in asdict(Settings()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}"
        )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    quiet_transformers()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"device: {device}")
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no GPU; use --device cpu")
        if options.out.exists():
            raise ValueError(f"{options.out} exists; choose another --out")
        report = build(settings, options.books, options.wikitext, options.out, device)
    except (OSError, ValueError, sparsify.SparsifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part, result in report["quality"].items():
        print(f"{part}: {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}")
    print(f"{report['seconds']:.0f} s, of them {report['training_seconds']:.0f} s of training")
    print(f"SHA-256 of {options.out / 'model.safetensors'}: {report['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
