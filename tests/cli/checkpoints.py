"""Small checkpoints with a tokenizer, and data to go with them."""

from __future__ import annotations

import hashlib
import json
import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
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


def t5(folder: Path) -> Path:
    """An encoder and decoder of two layers each."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(SPECIAL) + len(LETTERS),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=1,
        eos_token_id=3,
        decoder_start_token_id=1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer(framed=True).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """A ViT of two layers and two classes without names, for pictures of 32x32; its processor needs no torchvision."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def ast(folder: Path) -> Path:
    """A spectrogram transformer of two layers and two classes, for a second of sound."""
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_length=64,
        num_mel_bins=32,
        num_labels=2,
    )
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(folder)
    return folder


def wav2vec2(folder: Path) -> Path:
    """A speech model that reads the wave itself, with a mask for padding; two layers, two classes."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        conv_dim=(16, 16),
        conv_stride=(40, 8),
        conv_kernel=(40, 8),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=32,
        mask_time_prob=0.0,
        layerdrop=0.0,
        num_labels=2,
    )
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


def targets(folder: Path) -> Path:
    """Words and the same words backwards."""
    file = folder / "targets.jsonl"
    words = [f"word {index} {'abc' * (index % 3)}" for index in range(24)]
    file.write_text("".join(json.dumps({"source": w, "target": w[::-1]}) + "\n" for w in words))
    return file


def pictures(folder: Path) -> Path:
    """A folder of each class: dark pictures and bright ones, of several sizes."""
    generator = np.random.default_rng(0)
    for index in range(24):
        name = "bright" if index % 2 else "dark"
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
        size = (20 + index, 30, 3)
        pixels = generator.integers(0, 100, size, np.uint8) + np.uint8(150 if index % 2 else 0)
        Image.fromarray(pixels).save(folder / "pictures" / name / f"{index:02}.png")
    return folder / "pictures"


def sounds(folder: Path, rate: int = 8000) -> Path:
    """A folder of each class: high notes and low ones, of several lengths."""
    for index in range(16):
        name = "high" if index % 2 else "low"
        (folder / "sounds" / name).mkdir(parents=True, exist_ok=True)
        times = np.arange(rate // 4 + 100 * index) / rate
        wave_of = (np.sin(2 * np.pi * (1500 if index % 2 else 200) * times) * 20000).astype("<i2")
        with wave.open(str(folder / "sounds" / name / f"{index:02}.wav"), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(rate)
            stream.writeframes(wave_of.tobytes())
    return folder / "sounds"


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


def sentences(folder: Path) -> Path:
    """A text file with a sentence a line."""
    file = folder / "sentences.txt"
    file.write_text("".join(f"sentence {index} {'abc' * (index % 4)}\n" for index in range(48)))
    return file


def digests(folder: Path, *names: str) -> dict[str, str]:
    """SHA-256 of files by name; of the weights, the config and the tokenizer if no names are given."""
    wanted = names or ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
    files = [folder / name for name in wanted if (folder / name).exists()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
