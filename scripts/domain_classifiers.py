"""Dense classifiers of speech and of pictures, small enough to train in minutes, for the benchmark of the domains.

Both are transformers checkpoints with data as files, so that what prunes them is `sparsify.run` with a recipe that
comes with the package. A `Classifier` trains the dense one, whose decoded inputs fit into memory.
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.recipes.keyword_spotting import FOLDS, RATE, read_recordings
from sparsify.recipes.plain_modules import Domain, Length, Metrics, train_dense

BATCH = 64
SHIFT = RATE // 10


class Classifier(Domain):
    """A dense classifier of transformers in training.

    Args:
        network: Made anew in each call.
        key: Name of its input.
        inputs: `(S, ...)` float32.
        labels: `(S,)` int64.
        length: How long it trains.
    """

    metric = "accuracy"

    def __init__(self, network: Any, key: str, inputs: Tensor, labels: Tensor, length: Length) -> None:
        self.make, self.key, self.data, self.dense = network, key, (inputs, labels), length

    def network(self) -> nn.Module:
        """Random weights."""
        return self.make()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Inputs and labels."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(self.data[1]), (BATCH,), generator=generator)
            yield self.data[0][rows], self.data[1][rows]

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], teacher: nn.Module | None) -> Tensor:
        """Cross-entropy."""
        logits = network(**{self.key: batch[0]}).logits
        return nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.1)

    def evaluate(self, network: nn.Module) -> Metrics:
        """Nothing: the recipe evaluates."""
        return {}

    def inputs(self) -> dict[str, Tensor]:
        """One input."""
        return {self.key: self.data[0][:1]}


def speech(recordings: Path, folder: Path, fold: int, scale: float, device: str) -> None:
    """A Whisper-shaped encoder with a head for spoken digits: `folder/dense`, `folder/train`, `folder/test`.

    Args:
        recordings: WORD_SPEAKER_NUMBER.wav.
        folder: Where to.
        fold: Third of the speakers who are in `test` alone.
        scale: Of its training's length.
        device: Where it trains.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

    sounds, words, speakers = read_recordings(recordings)
    names, classes = sorted(set(speakers)), sorted(set(words))
    out = names[fold * len(names) // FOLDS : (fold + 1) * len(names) // FOLDS]
    for file in sorted(recordings.glob("*.wav")):
        word, speaker, _ = file.stem.split("_")
        place = folder / ("test" if speaker in out else "train") / word / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(file.resolve())
    extractor = WhisperFeatureExtractor(chunk_length=1)
    kept = torch.tensor([speaker not in out for speaker in speakers])
    generator = torch.Generator().manual_seed(0)
    own = sounds[kept]
    moved = []
    for shift in (0, *torch.randint(-SHIFT, SHIFT, (3,), generator=generator).tolist()):
        noisy = own.roll(shift, 1) + 0.005 * torch.randn(own.shape, generator=generator)
        features = extractor(list(noisy.numpy()), sampling_rate=RATE, return_tensors="pt", device="cpu")
        moved.append(features.input_features)
    labels = torch.tensor([classes.index(word) for word in words])[kept].repeat(len(moved))

    def network() -> nn.Module:
        return WhisperForAudioClassification(
            WhisperConfig(
                d_model=192, encoder_layers=4, encoder_attention_heads=3, encoder_ffn_dim=768, decoder_layers=1,
                max_source_positions=50, classifier_proj_size=128, dropout=0.1,
                id2label=dict(enumerate(classes)), label2id={word: n for n, word in enumerate(classes)},
            )
        )  # fmt: skip

    length = Length(max(2, round(1500 * scale)), 1e-3)
    domain = Classifier(network, "input_features", torch.cat(moved), labels, length)
    trained: Any = train_dense(domain, fold, device)
    trained.cpu().save_pretrained(folder / "dense")
    extractor.save_pretrained(folder / "dense")


def images(mnist: Path, folder: Path, seed: int, scale: float, device: str) -> None:
    """A ViT for handwritten digits: `folder/dense`, `folder/train.parquet`, `folder/test.parquet`.

    Args:
        mnist: Folder with MNIST's four files, each `.xz`.
        folder: Where to.
        seed: Of its weights.
        scale: Of its training's length.
        device: Where it trains.
    """
    from datasets import Dataset
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    folder.mkdir(parents=True, exist_ok=True)
    for part, name in (("train", "train"), ("test", "t10k")):
        pixels, labels = _idx(mnist, f"{name}-images-idx3-ubyte"), _idx(mnist, f"{name}-labels-idx1-ubyte")
        files = []
        for picture in pixels:
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "png")
            files.append(stream.getvalue())
        Dataset.from_dict({"image": files, "label": labels.tolist()}).to_parquet(folder / f"{part}.parquet")
        if part == "train":
            data = torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1).expand(-1, 3, -1, -1) / 127.5 - 1
            wanted = torch.from_numpy(labels.astype(np.int64))

    def network() -> nn.Module:
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=28,
                patch_size=4, hidden_dropout_prob=0.1, id2label={digit: str(digit) for digit in range(10)},
            )
        )  # fmt: skip

    domain = Classifier(network, "pixel_values", data, wanted, Length(max(2, round(6000 * scale)), 1e-3))
    trained: Any = train_dense(domain, seed, device)
    trained.cpu().save_pretrained(folder / "dense")
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"height": 28, "width": 28},
    }  # fmt: skip
    (folder / "dense" / "preprocessor_config.json").write_text(json.dumps(settings))


def _idx(folder: Path, name: str) -> np.ndarray:
    """An IDX file of bytes."""
    content = lzma.decompress((folder / f"{name}.xz").read_bytes())
    rank = content[3]
    sizes = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes)
