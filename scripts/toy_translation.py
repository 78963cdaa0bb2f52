"""A translation task small enough to learn in minutes, and a T5-shaped model that has learned it.

Numbers from 0 to 999,999 in English words are translated into German ones: "forty-two thousand seven" into
"zweiundvierzigtausendsieben". German says the ones before the tens and writes a number as one word, so a model has to
look ahead and to find its way inside words. Data, tokenizer and order are the same on every machine; nothing is
downloaded.

    python scripts/toy_translation.py --out build/translation
    sparsify run seq2seq_translation --model build/translation/model --out build/translation/sparse \
        --set data.train.path=build/translation/train.jsonl --set data.eval.path=build/translation/held_out.jsonl
    python scripts/toy_translation.py --check build/translation/sparse --out build/translation

The first command writes `train.jsonl` and `held_out.jsonl` (columns `source` and `target`, no number in both) and
trains the model from random weights by a recipe; a GPU is wanted, `--data-only` leaves the model out. The last one
counts the held-out numbers that a checkpoint translates without a mistake.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing comes from a hub

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config

import sparsify
from sparsify.cli.console import RichProgress, quiet_transformers
from sparsify.errors import SparsifyError
from sparsify.recipe.schema import Recipe

LIMIT = 1_000_000
VOCABULARY = 256
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # tokens 0, 1 and 2, as in T5
LENGTH = 64  # tokens; the longest number takes fewer

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
    "twenty thirty forty fifty sixty seventy eighty ninety",
)
GERMAN = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn",
    "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
)
ENGLISH_ONES, ENGLISH_TENS = (words.split() for words in ENGLISH)
GERMAN_ONES, GERMAN_TENS = (words.split() for words in GERMAN)


def english(number: int) -> str:
    """A number from 0 to 999,999 in English words.

    Raises:
        ValueError: If it is not in that range.
    """
    _check(number)
    if number >= 1000:
        rest = f" {english(number % 1000)}" if number % 1000 else ""
        return f"{english(number // 1000)} thousand{rest}"
    if number >= 100:
        rest = f" {english(number % 100)}" if number % 100 else ""
        return f"{ENGLISH_ONES[number // 100]} hundred{rest}"
    if number >= 20:
        return ENGLISH_TENS[number // 10 - 2] + (f"-{ENGLISH_ONES[number % 10]}" if number % 10 else "")
    return ENGLISH_ONES[number]


def german(number: int) -> str:
    """A number from 0 to 999,999 as a German word.

    Raises:
        ValueError: If it is not in that range.
    """
    _check(number)
    # A one at the end is "eins", before any other part "ein".
    return _german(number) + ("s" if number % 100 == 1 else "")


def _german(number: int) -> str:
    if number >= 1000:
        return f"{_german(number // 1000)}tausend{_german(number % 1000) if number % 1000 else ''}"
    if number >= 100:
        return f"{GERMAN_ONES[number // 100]}hundert{_german(number % 100) if number % 100 else ''}"
    if number >= 20:
        return (f"{GERMAN_ONES[number % 10]}und" if number % 10 else "") + GERMAN_TENS[number // 10 - 2]
    return GERMAN_ONES[number]


def _check(number: int) -> None:
    if not 0 <= number < LIMIT:
        raise ValueError(f"got {number}, expected a number from 0 to {LIMIT - 1:,}")


def split(train: int, held_out: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Chooses numbers to train on and others to measure on; those below 100 are always trained on.

    Args:
        train: How many to train on, at least 100.
        held_out: How many to measure on.
        seed: Decides the choice and the order.

    Raises:
        ValueError: If there are not that many numbers.
    """
    if train < 100 or held_out < 1 or train + held_out > LIMIT:
        raise ValueError(
            f"got {train} numbers to train on and {held_out} to measure on; expected at least 100 and 1, and no more "
            f"than {LIMIT:,} together"
        )
    chosen = random.Random(seed).sample(range(100, LIMIT), train + held_out - 100)
    training = [*range(100), *chosen[held_out:]]
    random.Random(seed).shuffle(training)
    return training, chosen[:held_out]


def write_data(out: Path, train: int, held_out: int, seed: int = 0) -> dict[str, Path]:
    """Writes `train.jsonl` and `held_out.jsonl`; returns their paths by name.

    Raises:
        OSError: If that is impossible.
        ValueError: As `split`.
    """
    parts = dict(zip(("train", "held_out"), split(train, held_out, seed), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.jsonl" for name in parts}
    for name, numbers in parts.items():
        rows = ({"source": english(number), "target": german(number)} for number in numbers)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files[name].write_text("".join(lines), encoding="utf-8", newline="\n")
    return files


def write_skeleton(folder: Path, file: Path, width: int = 256, layers: int = 3) -> None:
    """Writes what `from_scratch` needs: a T5's configuration, and a tokenizer fitted to the data.

    Args:
        folder: Folder to write.
        file: `train.jsonl`.
        width: Features of a token, a multiple of 64; with 256 and three layers the model has 5.6M parameters.
        layers: Of the encoder, and of the decoder.

    Raises:
        ValueError: If a size is impossible.
    """
    if width < 64 or width % 64 or layers < 1:
        raise ValueError(f"got width {width} and {layers} layers; expected a multiple of 64 and at least 1")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, END, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator((row[side] for row in rows for side in ("source", "target")), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    config: Any = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=64,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 64,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        architectures=["T5ForConditionalGeneration"],
    )
    config.decoder_start_token_id = 0
    config.save_pretrained(folder)


def recipe(out: Path, files: dict[str, Path], steps: int, batch: int, seed: int) -> Recipe:
    """The recipe that trains the model from random weights and measures it."""
    return Recipe.from_dict(
        {
            "version": 1,
            "name": "toy_translation",
            "description": "Train a small model to translate numbers",
            "model": str(out / "skeleton"),
            "out": str(out / "model"),
            "task": "seq2seq",
            "from_scratch": True,
            "seed": seed,
            "data": {
                "train": {"path": str(files["train"]), "length": LENGTH},
                "eval": {"path": str(files["held_out"]), "length": LENGTH},
            },
            "stages": [
                {
                    "stage": "finetune",
                    "steps": steps,
                    "batch": batch,
                    "learning_rate": 1e-3,
                    "weight_decay": 0.1,
                    "trainer": {"adam_beta2": 0.98},
                },
                {"stage": "evaluate", "label": "dense", "batch": 64},
                {"stage": "report"},
            ],
        }
    )


@torch.no_grad()
def count_right(checkpoint: Path, file: Path, samples: int = 500) -> tuple[int, int]:
    """How many numbers a checkpoint, dense or block-sparse, translates without a mistake, and of how many.

    Args:
        checkpoint: The model's folder.
        file: `held_out.jsonl`.
        samples: At most this many.

    Raises:
        CheckpointError: If the checkpoint cannot be loaded.
        OSError: If the file cannot be read.
    """
    lines = file.read_text(encoding="utf-8").splitlines()[:samples]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = sparsify.load(checkpoint, device=device, task="seq2seq")
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    right = 0
    for start in range(0, len(lines), 100):
        rows = [json.loads(line) for line in lines[start : start + 100]]
        inputs = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt").to(device)
        tokens = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        right += sum(answer == row["target"] for answer, row in zip(answers, rows, strict=True))
    return right, len(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the data and the model")
    parser.add_argument("--train", type=int, default=50_000, help="numbers to train on")
    parser.add_argument("--held-out", type=int, default=2_000, help="numbers to measure on")
    parser.add_argument("--width", type=int, default=256, help="features of a token")
    parser.add_argument("--layers", type=int, default=3, help="layers of the encoder, and of the decoder")
    parser.add_argument("--steps", type=int, default=1_000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=256, help="numbers in one step")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the numbers chosen, the weights, and the order"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that is there")
    parser.add_argument("--data-only", action="store_true", help="write the data and train nothing")
    parser.add_argument(
        "--check", type=Path, metavar="CHECKPOINT", help="only count what this one gets right"
    )
    options = parser.parse_args(argv)
    try:
        if options.check is None:
            files = write_data(options.out, options.train, options.held_out, options.seed)
            print(
                f"{options.train:,} numbers in {files['train']}, {options.held_out:,} in {files['held_out']}"
            )
            if options.data_only:
                return 0
            write_skeleton(options.out / "skeleton", files["train"], options.width, options.layers)
            job = recipe(options.out, files, options.steps, options.batch, options.seed)
            quiet_transformers()
            print(sparsify.run(job, force=options.force, progress=RichProgress()))
        checkpoint = options.check or options.out / "model"
        right, count = count_right(checkpoint, options.out / "held_out.jsonl")
        print(f"{right} of {count} held-out numbers translated without a mistake")
    except (SparsifyError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
