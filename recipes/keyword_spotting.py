"""Spoken keywords: the keyword transformer KWT-1, fine-tuned on words of your own, then block-sparse.

Its matrices are 64x64 and 256x64, so blocks are small: 8x8 or 16x16.

Needs: a folder with kwt1.safetensors (the weights of models_data_v2_12_labels/kwt1 of
    github.com/ARM-software/keyword-transformer, named as in `KeywordTransformer`) and recordings/: WAV files named
    WORD_SPEAKER_NUMBER.wav, such as the Free Spoken Digit Dataset.
Command: python -m sparsify.recipes.keyword_spotting path/to/folder --out path/to/networks
Outcome: see docs/benchmarks/domains.md.

What is reported is of speakers whom the network has never heard: the speakers, sorted by name, are split in three, and
one third is left out of the training.

Source: Berg, O'Connor and Cruz, Keyword Transformer: A Self-Attention Model for Keyword Spotting, 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.data.media import decode_sound
from sparsify.errors import DataError
from sparsify.recipes import plain_modules
from sparsify.recipes.plain_modules import Length, Metrics

RATE = 16_000  # samples a second; a clip is one second
WINDOW, HOP = 480, 160
BATCH = 64
SHIFT = RATE // 10  # a clip begins up to so many samples later or earlier
NOISE = 0.02  # loudest background
FOLDS = 3


class Frontend(nn.Module):
    """Cepstral coefficients of sound, by fixed matrices that come with the weights."""

    window: Tensor
    dft_a: Tensor
    dft_b: Tensor
    mel: Tensor
    dct: Tensor
    scale: Tensor

    def __init__(self, frequencies: int = 244, bands: int = 80, features: int = 40) -> None:
        super().__init__()
        sizes = {
            "window": (WINDOW,), "dft_a": (frequencies, WINDOW), "dft_b": (frequencies, WINDOW),
            "mel": (bands, frequencies), "dct": (features, bands), "scale": (features,),
        }  # fmt: skip
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))

    def forward(self, sound: Tensor) -> Tensor:
        """`(B, frames, features)` of `(B, samples)` from -1 to 1."""
        frames = sound.unfold(1, WINDOW, HOP) * self.window
        magnitude = (frames @ self.dft_a.t()).square() + (frames @ self.dft_b.t()).square()
        return (magnitude.sqrt() @ self.mel.t()).clamp(min=1e-12).log() @ self.dct.t() * self.scale


class Attention(nn.Module):
    """Self-attention of one head, without biases but the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, width)` from the like."""
        q, k, v = (part(x).unsqueeze(1) for part in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).squeeze(1))


class Mlp(nn.Module):
    """Two layers with a tanh-GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` from the like."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each normalised after it is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width), Mlp(width)
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, width)` from the like."""
        x = self.ln1(x + self.attn(x))
        return self.ln2(x + self.mlp(x))


class KeywordTransformer(nn.Module):
    """KWT: frames of a second of sound as tokens, and one more that becomes the answer.

    Args:
        words: Number of words.
        width: 64 is KWT-1.
        layers: 12 in all published sizes.
    """

    def __init__(self, words: int, width: int = 64, layers: int = 12) -> None:
        super().__init__()
        self.frontend = Frontend()
        self.embed = nn.Linear(40, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, 2 + (RATE - WINDOW) // HOP, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.head = nn.Linear(width, words)

    def forward(self, sound: Tensor) -> Tensor:
        """Logits `(B, words)` of `(B, 16000)` samples from -1 to 1."""
        x = self.embed(self.frontend(sound))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class KeywordSpotting(plain_modules.Domain):
    """The keyword transformer with recordings; see the module.

    Args:
        folder: With weights and recordings.
        fold: Which third of the speakers is left out and reported, 0 to 2.
        validate: Report one of the training speakers instead, who is left out too: to choose settings by.
    """

    metric = "accuracy"
    dense = Length(600, 5e-4)
    sparse = Length(900, 5e-4)

    def __init__(self, folder: Path, fold: int = 0, validate: bool = False) -> None:
        self.weights = folder / "kwt1.safetensors"
        if not self.weights.is_file():
            raise DataError(f"there are no weights {self.weights}")
        sounds, words, speakers = read_recordings(folder / "recordings")
        self.words = sorted(set(words))
        names = sorted(set(speakers))
        if len(names) < FOLDS:
            raise DataError(f"{folder}: got {len(names)} speakers, expected {FOLDS} or more")
        out = names[fold * len(names) // FOLDS : (fold + 1) * len(names) // FOLDS]
        judged = [next(name for name in names if name not in out)] if validate else out
        labels = torch.tensor([self.words.index(word) for word in words])
        train = torch.tensor([name not in out and name not in judged for name in speakers])
        test = torch.tensor([name in judged for name in speakers])
        self.train, self.test = (sounds[train], labels[train]), (sounds[test], labels[test])

    def network(self) -> nn.Module:
        """The pretrained transformer with a new head."""
        from safetensors.torch import load_file

        weights = {name: w for name, w in load_file(self.weights).items() if not name.startswith("head.")}
        layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        network = KeywordTransformer(len(self.words), weights["cls"].shape[-1], layers)
        network.load_state_dict(weights | {f"head.{k}": v for k, v in network.head.state_dict().items()})
        return network

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Sounds `(B, 16000)`, shifted and with noise, and labels `(B,)`."""
        generator = torch.Generator().manual_seed(seed)
        sounds, labels = self.train
        places = torch.arange(RATE)
        while True:
            rows = torch.randint(len(sounds), (BATCH,), generator=generator)
            shift = torch.randint(-SHIFT, SHIFT + 1, (BATCH, 1), generator=generator)
            shifted = sounds[rows].gather(1, (places + shift) % RATE)
            loudness = NOISE * torch.rand(BATCH, 1, generator=generator)
            yield shifted + loudness * torch.randn(BATCH, RATE, generator=generator), labels[rows]

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], teacher: nn.Module | None) -> Tensor:
        """Cross-entropy with smoothed labels, and nearness to a teacher's answers."""
        sounds, labels = batch
        logits = network(sounds)
        own = functional.cross_entropy(logits, labels, label_smoothing=0.1)
        if teacher is None:
            return own
        with torch.no_grad():
            taught = teacher(sounds).log_softmax(1)
        return own + functional.kl_div(logits.log_softmax(1), taught, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> Metrics:
        """`accuracy` on the speakers who were left out."""
        device = next(network.parameters()).device
        sounds, labels = self.test
        found = torch.cat([network(part.to(device)).argmax(1).cpu() for part in sounds.split(100)])
        return {"accuracy": (found == labels).double().mean().item()}

    def inputs(self) -> dict[str, Tensor]:
        """A second of sound."""
        return {"sound": self.test[0][:1]}


def read_recordings(folder: Path) -> tuple[Tensor, list[str], list[str]]:
    """Recordings in the middle of a second, longer ones cut.

    Returns:
        Sounds `(S, 16000)` float32, their words and their speakers.

    Raises:
        DataError: If there are none, or a name is no WORD_SPEAKER_NUMBER.wav.
    """
    files = sorted(folder.glob("*.wav"))
    if not files:
        raise DataError(f"{folder} holds no recordings (.wav)")
    sounds, words, speakers = torch.zeros(len(files), RATE), [], []
    for row, file in zip(sounds, files, strict=True):
        parts = file.stem.split("_")
        if len(parts) != 3:
            raise DataError(f"{file} is not named WORD_SPEAKER_NUMBER.wav")
        sound = torch.from_numpy(decode_sound({"path": str(file)}, RATE))[:RATE]
        start = (RATE - len(sound)) // 2
        row[start : start + len(sound)] = sound
        words.append(parts[0])
        speakers.append(parts[1])
    return sounds, words, speakers


if __name__ == "__main__":
    plain_modules.command(KeywordSpotting, __doc__, sparsity=0.5, block="8x8")
