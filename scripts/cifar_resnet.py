"""CIFAR-10 and its small residual networks: pictures from an archive, the model, training with a teacher, accuracy."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALIDATION = 500  # pictures of each class
MARGIN = 4  # pixels that a crop may be off by
# Share of the teacher in the loss, and the temperature of its answers (Hinton, Vinyals, Dean 2015).
TEACHER, TEMPERATURE = 0.7, 4.0


class Block(nn.Module):
    """Two 3x3 convolutions beside a short cut, which passes over pixels and adds empty channels where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return functional.relu(x + y)


class CifarResNet(nn.Module):
    """The residual network of He et al. (2015), section 4.2, of `6 * blocks + 2` layers.

    Args:
        blocks: Blocks in each of the three stages; 3 for ResNet-20, 5 for ResNet-32.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, 10)` of pictures `(B, 3, 32, 32)`."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build(name: str) -> CifarResNet:
    """A network without training, by its name such as `resnet20`."""
    return CifarResNet((int(name.removeprefix("resnet")) - 2) // 6)


def published(name: str, folder: Path) -> CifarResNet:
    """The network with the published weights: the file in `folder` whose name begins with its own."""
    model = build(name)
    state = torch.load(next(folder.glob(f"{name}-*.th")), map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model


@dataclass
class Pictures:
    """Pictures as bytes `(N, 3, 32, 32)` uint8 and their labels `(N,)` int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Pictures:
        """The same on another device."""
        return Pictures(self.pixels.to(device), self.labels.to(device))


def read(archive: Path, cache: Path) -> Pictures:
    """The pictures of a tar archive `<split>/<class>/<name>.jpg`, classes in alphabetic order; decoded once."""
    from PIL import Image

    file = cache / f"{archive.name}.npz"
    if not file.exists():
        found: dict[str, list[tuple[str, np.ndarray]]] = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if content is not None:
                    picture = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
                    found.setdefault(member.name.split("/")[-2], []).append((member.name, picture))
        pixels = [
            picture for name in sorted(found) for _, picture in sorted(found[name], key=lambda pair: pair[0])
        ]
        labels = [label for label, name in enumerate(sorted(found)) for _ in found[name]]
        cache.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".tmp").open("wb") as stream:
            np.savez(stream, pixels=np.stack(pixels).transpose(0, 3, 1, 2), labels=np.array(labels))
        file.with_suffix(".tmp").replace(file)
    with np.load(file) as stored:
        return Pictures(torch.from_numpy(stored["pixels"]), torch.from_numpy(stored["labels"]))


def split(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """Training and validation pictures: `VALIDATION` of each class, drawn once and for all."""
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(pictures), dtype=torch.bool)
    for label in pictures.labels.unique():
        own = (pictures.labels == label).nonzero().flatten()
        held[own[torch.randperm(len(own), generator=generator)[:VALIDATION]]] = True
    training, validation = (Pictures(pictures.pixels[part], pictures.labels[part]) for part in (~held, held))
    return training, validation


def normalised(pixels: Tensor) -> Tensor:
    """What the network reads: `(B, 3, 32, 32)` float32 in channels-last memory."""
    mean, deviation = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, DEVIATION)
    )
    return ((pixels.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to four pixels, what comes in black, and half of them mirrored."""
    count, _, height, width = pixels.shape
    places = torch.randint(0, 2 * MARGIN + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = (places[0] + torch.arange(height)).to(pixels.device)
    columns = places[1] + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    padded = functional.pad(pixels, (MARGIN,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[each, rows[:, :, None], columns.to(pixels.device)[:, None, :]].permute(0, 3, 1, 2)


def batches(pictures: Pictures, batch: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented inputs and labels, every picture once an epoch but for a last incomplete batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(pictures), generator=generator).to(pictures.labels.device)
        for rows in order[: len(order) // batch * batch].split(batch):
            yield normalised(augmented(pictures.pixels[rows], generator)), pictures.labels[rows]


def train(
    model: nn.Module,
    data: Pictures,
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    teacher: nn.Module | None = None,
    started: Callable[[torch.optim.Optimizer, int], None] | None = None,
) -> None:
    """Trains with SGD, the learning rate falling along half a cosine after a twentieth of warm-up.

    Args:
        model: The network.
        data: Training pictures.
        epochs: How often each is seen.
        batch: Pictures in one step.
        rate: Highest learning rate.
        seed: Of order and augmentation.
        teacher: Whose answers the network learns from too.
        started: Told of the optimizer and the number of steps before the first.
    """
    steps = epochs * (len(data) // batch)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))
    )
    if started is not None:
        started(optimizer, steps)
    model.train()
    for x, labels in batches(data, batch, epochs, seed):
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            logits = model(x).float()
            loss = functional.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    answers = functional.log_softmax(teacher(x).float() / TEMPERATURE, 1)
                own = functional.log_softmax(logits / TEMPERATURE, 1)
                apart = functional.kl_div(own, answers, reduction="batchmean", log_target=True)
                loss = (1 - TEACHER) * loss + TEACHER * TEMPERATURE**2 * apart
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Pictures, batch: int = 500) -> float:
    """Share of right answers, in percent, in float32."""
    model.eval()
    parts = zip(data.pixels.split(batch), data.labels.split(batch), strict=True)
    right = sum(int((model(normalised(pixels)).argmax(1) == labels).sum()) for pixels, labels in parts)
    return 100 * right / len(data)
