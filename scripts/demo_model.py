"""Train the small language model of the quickstart: a Llama that writes like Python's documentation.

Prerequisite: the packages of this project, nothing else; `demo_corpus.py` takes the text from the Python that
runs this. The command that made the checkpoint in `recipes/demo` (a minute on a GPU, hours on a CPU):

    python scripts/demo_model.py --out build/demo

Equal text, settings, seed, library versions and hardware give equal weights; elsewhere they differ by
rounding. The text is small, so the model sees it many times: dropout and weight decay keep it from learning
it by heart. Their values, like `--steps`, were chosen on `validation.txt`, never on `heldout.txt`, among 19 runs:
at 2000 steps and dropout 0.1 the validation loss fell to 3.39 nats a token and climbed to 4.27; 1000 steps with
dropout 0.2 and weight decay 1 ended at 3.23; the defaults end at 3.20. A wider feed-forward layer gained nothing.
"""

import argparse
import math
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from demo_card import describe
from demo_corpus import Corpus, collect

END, PAD = "<|endoftext|>", "<|pad|>"  # tokens 0 and 1
SIZE_LIMIT = 8_000_000  # bytes of model.safetensors


@dataclass(frozen=True)
class Settings:
    """Everything besides the text and the architecture that decides the weights.

    Attributes:
        steps: Optimizer steps; more of them need more dropout.
        batch: Windows a step.
        window: Tokens a window.
        learning_rate: Peak; linear warm-up over the first twentieth, then down to 0 along a cosine.
        weight_decay: AdamW's, on matrices; raise it when the validation loss turns upwards.
        dropout: After the embedding and after each attention and feed-forward output, in training alone.
        vocabulary: Tokens of the byte-level BPE tokenizer.
        feed_forward: Width of the feed-forward layers.
        seed: Of the initial weights, the order of windows and the dropout.
    """

    steps: int = 900
    batch: int = 32
    window: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 2.0
    dropout: float = 0.25
    vocabulary: int = 1024
    feed_forward: int = 1024
    seed: int = 0


def make_tokenizer(corpus: Corpus, settings: Settings) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE tokenizer to the training text; any UTF-8 text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in corpus.train), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=settings.window,
        clean_up_tokenization_spaces=False,
    )


def make_model(settings: Settings) -> LlamaForCausalLM:
    """Build the untrained model: width 384, 2 layers, 6 query and 2 key-value heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=384,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=settings.window,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, rate: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Drop a share of what enters the residual stream while training; `LlamaConfig` has no such option."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    writers = ("embed_tokens", "o_proj", "down_proj")
    return [m.register_forward_hook(drop) for name, m in model.named_modules() if name.endswith(writers)]


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return a text's tokens, int64 ``(T,)``, with an end token in place of each blank line."""
    return torch.tensor(tokenizer(text.replace("\n\n", END), verbose=False)["input_ids"])


class Windows(torch.utils.data.Dataset):
    """Overlapping windows of token streams, so that an epoch meets each token at several positions."""

    def __init__(self, streams: list[torch.Tensor], length: int, stride: int):
        shortest = min(len(stream) for stream in streams)
        if shortest < length:
            raise ValueError(f"a window of {length} tokens does not fit a text of {shortest}; lower --window")
        self.windows = [w for stream in streams for w in stream.unfold(0, length, stride)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, window: int) -> tuple[float, int]:
    """Return (summed loss in nats, number of predicted tokens) over windows that do not overlap."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, window):
        tokens = stream[start : start + window + 1].to(model.device)
        logits = model(tokens[None, :-1]).logits[0].float()
        total += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
        count += len(tokens) - 1
    model.train(training)
    return total, count


class ValidationLog(TrainerCallback):
    """Print the validation loss now and then: the number that the settings are chosen by."""

    def __init__(self, stream: torch.Tensor, settings: Settings):
        self.stream, self.settings = stream, settings

    def on_step_end(self, args, state, control, model=None, **_):
        """Measure at every tenth of the run."""
        if model is not None and state.global_step % max(1, self.settings.steps // 10) == 0:
            total, count = evaluate(model, self.stream, self.settings.window)
            print(f"step {state.global_step}: validation loss {total / count:.4f} nats a token", flush=True)


def train(
    model: LlamaForCausalLM,
    streams: list[torch.Tensor],
    validation: torch.Tensor,
    settings: Settings,
    device: str,
) -> None:
    """Train in place with the Hugging Face `Trainer`; on a GPU under bfloat16 autocast."""
    hooks = add_dropout(model, settings.dropout)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.steps // 20,
            weight_decay=settings.weight_decay,
            adam_beta2=0.95,
            seed=settings.seed,
            full_determinism=True,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            logging_steps=max(1, settings.steps // 20),
            save_strategy="no",
            report_to="none",
        )
        data = Windows(streams, settings.window, settings.window // 4)
        log = ValidationLog(validation, settings)
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[log]).train()
    for hook in hooks:
        hook.remove()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Write the checkpoint under a temporary name, check its size, and move it into place."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.config.use_cache = True  # switched off in training
    model.generation_config = GenerationConfig(
        max_new_tokens=64, bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / "README.md").write_text(card, encoding="utf-8")
    size = (part / "model.safetensors").stat().st_size
    if size >= SIZE_LIMIT:
        raise ValueError(
            f"the weights take {size:,} bytes, the limit is {SIZE_LIMIT:,}; "
            f"lower --vocabulary or --feed-forward (the checkpoint is left in {part})"
        )
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)


def build(settings: Settings, device: str, corpus: Corpus, out: Path) -> dict[str, float]:
    """Train, save and measure one model.

    Args:
        settings: See `Settings`.
        device: ``"cpu"`` or ``"cuda"``.
        corpus: The text.
        out: Folder of the checkpoint; replaced if it exists.

    Returns:
        Loss in nats a token, perplexity and bits a byte (``validation_*`` and ``heldout_*``) of the saved
        bfloat16 weights, computed in float32.

    Raises:
        ValueError: If the weights would not fit `SIZE_LIMIT`.
    """
    started = time.monotonic()
    set_seed(settings.seed)
    tokenizer = make_tokenizer(corpus, settings)
    model = make_model(settings)
    texts = corpus.texts
    streams = {part: encode(text, tokenizer) for part, text in texts.items()}
    # The second stream keeps the blank lines: the model can then read a plain text file as it is.
    raw = torch.tensor(tokenizer(texts["train"], verbose=False)["input_ids"])
    print(f"{model.num_parameters():,} parameters, {len(streams['train']):,} training tokens", flush=True)
    train(model, [streams["train"], raw], streams["validation"], settings, device)
    seconds = time.monotonic() - started

    model.cpu().bfloat16().float()  # measure the numbers that the file will hold
    results: dict[str, float] = {}
    for part in ("validation", "heldout"):
        total, count = evaluate(model, streams[part], settings.window)
        results |= {
            f"{part}_loss": total / count,
            f"{part}_perplexity": math.exp(total / count),
            f"{part}_bits_per_byte": total / math.log(2) / len(texts[part].encode()),
        }
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    facts = {
        "parameters": model.num_parameters(),
        "training tokens": len(streams["train"]),
        "tokens seen": settings.steps * settings.batch * settings.window,
    }
    trained_on = (
        f"{where}, {seconds:.0f} s, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    card = describe(asdict(settings), corpus, results, facts, trained_on)
    save(model.bfloat16(), tokenizer, card, out)
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; each field of `Settings` is an option."""
    parser = argparse.ArgumentParser(description="Train the quickstart's language model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--stdlib", type=Path, help="library folder to read (default: this Python's)")
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    for name, value in asdict(Settings()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}"
        )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"device: {device}")
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no GPU; use --device cpu")
        if options.out.exists() and not options.force:
            raise ValueError(f"{options.out} exists; pass --force to replace it, or choose another --out")
        if options.out.exists() and not (options.out / "config.json").is_file():
            raise ValueError(
                f"{options.out} is no checkpoint, so --force leaves it alone; choose another --out"
            )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results = build(settings, device, collect(options.stdlib), options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in results.items():
        print(f"{name}: {value:.4f}")
    print(f"checkpoint: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
