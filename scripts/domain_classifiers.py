"""Data and blank networks of the two domains whose networks are checkpoints of transformers: speech and pictures.

Each function writes its data as files, and a checkpoint without weights: configuration and feature extractor. All that
follows, the dense network too, is made by recipes, so that both networks see the same inputs.
"""

from __future__ import annotations

import io
import json
import lzma
import wave
from pathlib import Path

import numpy as np

from sparsify.recipes.keyword_spotting import FOLDS, RATE, read_recordings

# Copies of each training recording, moved in time by up to a tenth of a second and with noise.
COPIES = 3
SHIFT = RATE // 10


def speech(recordings: Path, folder: Path, fold: int) -> dict[str, Path]:
    """Spoken digits, and a Whisper-shaped encoder with a head for them.

    Args:
        recordings: WORD_SPEAKER_NUMBER.wav.
        folder: Where to.
        fold: Third of the speakers who are in `eval` alone.

    Returns:
        `blank`, `train` and `eval`: folders.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor

    made = {use: folder / use for use in ("blank", "train", "eval")}
    sounds, words, speakers = read_recordings(recordings)
    names, classes = sorted(set(speakers)), sorted(set(words))
    out = names[fold * len(names) // FOLDS : (fold + 1) * len(names) // FOLDS]
    generator = np.random.default_rng(fold)
    for row, (sound, word, speaker) in enumerate(zip(sounds.numpy(), words, speakers, strict=True)):
        use = "eval" if speaker in out else "train"
        place = made[use] / word
        place.mkdir(parents=True, exist_ok=True)
        _write(place / f"{row}.wav", sound)
        for copy in range(COPIES if use == "train" else 0):
            moved = np.roll(sound, generator.integers(-SHIFT, SHIFT))
            _write(place / f"{row}-{copy}.wav", moved + generator.normal(0, 0.005, len(sound)))
    WhisperConfig(
        d_model=192, encoder_layers=4, encoder_attention_heads=3, encoder_ffn_dim=768, decoder_layers=1,
        max_source_positions=50, classifier_proj_size=128, dropout=0.1,
        id2label=dict(enumerate(classes)), label2id={word: n for n, word in enumerate(classes)},
        architectures=["WhisperForAudioClassification"],
    ).save_pretrained(made["blank"])  # fmt: skip
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(made["blank"])
    return made


def images(mnist: Path, folder: Path) -> dict[str, Path]:
    """Handwritten digits, and a ViT for them.

    Args:
        mnist: Folder with MNIST's four files, each `.xz`.
        folder: Where to.

    Returns:
        `blank`, a folder; `train` and `eval`, tables.
    """
    from datasets import Dataset
    from PIL import Image
    from transformers import ViTConfig

    made = {"blank": folder / "blank", "train": folder / "train.parquet", "eval": folder / "eval.parquet"}
    folder.mkdir(parents=True, exist_ok=True)
    for use, name in (("train", "train"), ("eval", "t10k")):
        pixels, labels = _idx(mnist, f"{name}-images-idx3-ubyte"), _idx(mnist, f"{name}-labels-idx1-ubyte")
        files = []
        for picture in pixels:
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "png")
            files.append(stream.getvalue())
        Dataset.from_dict({"image": files, "label": labels.tolist()}).to_parquet(made[use])
    ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=28,
        patch_size=4, hidden_dropout_prob=0.1, id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)}, architectures=["ViTForImageClassification"],
    ).save_pretrained(made["blank"])  # fmt: skip
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"height": 28, "width": 28},
    }  # fmt: skip
    (made["blank"] / "preprocessor_config.json").write_text(json.dumps(settings))
    return made


def _write(file: Path, sound: np.ndarray) -> None:
    """A second of sound, -1 to 1, as 16 bits."""
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(RATE)
        stream.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())


def _idx(folder: Path, name: str) -> np.ndarray:
    """An IDX file of bytes."""
    content = lzma.decompress((folder / f"{name}.xz").read_bytes())
    rank = content[3]
    sizes = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes)
