"""Small checkpoints with a tokenizer, and data to go with them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<mask>"]
LETTERS = [chr(code) for code in range(32, 127)]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


def tokenizer(framed: bool = False) -> PreTrainedTokenizerFast:
    """One token a letter; `framed` puts special tokens around a text, as encoders want it."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if framed:
        letters.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, **names)


def llama(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama with grouped queries and tied embeddings; 32x32 blocks pad its 200-wide FFN."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(LETTERS),
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bert(folder: Path, cls: type = BertModel) -> Path:
    """A BERT encoder, bare or with a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(LETTERS),
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=1,
        num_labels=2,
    )
    cls(config).save_pretrained(folder)
    tokenizer(framed=True).save_pretrained(folder)
    return folder


def bert_masked(folder: Path) -> Path:
    """A BERT for masked language modelling."""
    return bert(folder, BertForMaskedLM)


def bert_classifier(folder: Path) -> Path:
    """A BERT with two classes."""
    return bert(folder, BertForSequenceClassification)


def text(folder: Path) -> Path:
    """A text file of about 8000 letters."""
    file = folder / "text.txt"
    file.write_text(TEXT * 100)
    return file


def labelled(folder: Path) -> Path:
    """Texts with a label that their letters decide."""
    file = folder / "labelled.csv"
    rows = [f"{('x' if index % 2 else 'o') * 12} {index},{index % 2}" for index in range(32)]
    file.write_text("\n".join(["text,label", *rows]))
    return file


def pairs(folder: Path) -> Path:
    """Sentence pairs with scores from 0 to 5."""
    file = folder / "pairs.csv"
    rows = [
        f"sentence {index},{'sentence' if index % 2 else 'other'} {index},{index % 6}" for index in range(24)
    ]
    file.write_text("\n".join(["sentence1,sentence2,score", *rows]))
    return file


def digests(folder: Path, *names: str) -> dict[str, str]:
    """SHA-256 of files by name; of the weights, the config and the tokenizer if no names are given."""
    wanted = names or ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
    files = [folder / name for name in wanted if (folder / name).exists()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
