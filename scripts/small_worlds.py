"""Networks of equal parameter count: narrow and dense, or wide and sparse from the start, by patterns of blocks.

Three tasks: an MLP on MNIST, an LSTM and a Llama that predict the next byte of classic books. `bench_small_worlds.py`
trains them; here is what they are.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsify
from reference_lm import read_books
from sparsify import BlockMask
from sparsify.patterns import layers_to_mix

DENSE, WIDE = "dense", "dense_wide"
PATTERNS = ("random_blocks", "balanced_random", "watts_strogatz", "barabasi_albert")
NETWORKS = (DENSE, *PATTERNS, WIDE)


@dataclass(frozen=True)
class Task:
    """What is trained, and how long.

    Attributes:
        name: `mnist`, `lstm` or `lm`.
        narrow: Width of the dense network, whose parameters are the budget.
        wide: Width of the sparse ones.
        block: Block shape.
        targets: What is sparse in the wide ones (see `sparsify.prune`).
        steps: Optimizer steps.
        batch: Samples a step.
        length: Bytes of a sample; 0 for pictures.
        rates: Learning rates, of which each network gets the better one.
        layers: Depth of the Llama.
    """

    name: str
    narrow: int
    wide: int
    block: str
    targets: tuple[str, ...] | None
    steps: int
    batch: int
    length: int
    rates: tuple[float, ...]
    layers: int = 0


TASKS = {
    "mnist": Task("mnist", 96, 512, "16x16", ("fc1", "fc2"), 5000, 128, 0, (1e-3, 3e-3)),
    "lstm": Task("lstm", 512, 1536, "32x32", ("lstm",), 1500, 64, 128, (2e-3, 4e-3)),
    "lm": Task("lm", 256, 512, "32x32", None, 3000, 32, 256, (1e-3, 2e-3), layers=6),
}


def scaled(task: Task, scale: float) -> Task:
    """The task with so many times the steps, and below 1 with narrower networks too; for a quick look."""
    if scale >= 1:
        return replace(task, steps=round(task.steps * scale))
    step = {"mnist": 32, "lstm": 64, "lm": 64}[task.name]
    narrow = max(step, round(task.narrow * scale) // step * step)
    return replace(
        task,
        steps=max(4, round(task.steps * scale)),
        narrow=narrow,
        wide=narrow * (task.wide // task.narrow),
        batch=max(8, round(task.batch * scale)),
        length=min(task.length, 32),
        layers=min(task.layers, 2),
    )


class Mlp(nn.Module):
    """Two hidden layers of one width on a picture of 28x28."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(784, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, 10)` of pictures `(B, 784)`."""
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class ByteLstm(nn.Module):
    """One LSTM layer between an embedding of 128 and a dense head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 128)
        self.lstm = nn.LSTM(128, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, T, 256)` of the bytes that follow `x` `(B, T)`."""
        return self.head(self.lstm(self.embedding(x))[0])


class ByteLlama(nn.Module):
    """A Llama that reads bytes."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = max(1, width // 64)
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True, use_cache=False,
                max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, T, 256)` of the bytes that follow `x` `(B, T)`."""
        return self.llama(input_ids=x).logits


def make(task: Task, width: int) -> nn.Module:
    """The task's dense network of a width."""
    if task.name == "mnist":
        return Mlp(width)
    return ByteLstm(width) if task.name == "lstm" else ByteLlama(width, task.layers)


def parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Network:
    """A network before its training.

    Attributes:
        model: The network.
        density: Share of the sparse layers' weights that exist.
        mix: Layers (for the LSTM, time steps) until every input reaches every output, with one layer's mask over and
            over; 1 for dense ones, `None` if it never happens.
    """

    model: nn.Module
    density: float
    mix: int | None


def build(task: Task, kind: str, seed: int) -> Network:
    """A network of one of `NETWORKS`, its weights drawn by `seed`.

    Raises:
        ValueError: If the wide network's dense parts alone exceed the narrow one's parameters.
    """
    torch.manual_seed(seed)
    if kind in (DENSE, WIDE):
        return Network(make(task, task.narrow if kind == DENSE else task.wide), 1.0, 1)
    with torch.device("meta"):
        budget = parameters(make(task, task.narrow))
    model = make(task, task.wide)
    everything = sparsify.prune(
        model, method=kind, block=task.block, sparsity=0.0, scope="layer", targets=task.targets, convert=False
    )
    sparse = sum(mask.shape[0] * mask.shape[1] for mask in everything.masks.values())
    density = (budget - (parameters(model) - sparse)) / sparse
    if density <= 0:
        raise ValueError(f"{task.name}: a width of {task.wide} leaves nothing for the sparse layers")
    result = sparsify.prune(
        model,
        method=kind,
        block=task.block,
        sparsity=1 - density,
        scope="layer",
        targets=task.targets,
        seed=seed,
    )
    with torch.no_grad():  # as many inputs fewer, as much larger: the variance of a layer's outputs stays
        for name, mask in result.masks.items():
            owner = model.get_submodule(name if ".weight_" not in name else name.rpartition(".")[0])
            weight: Any = getattr(owner, name.rpartition(".")[2] if ".weight_" in name else "weight")
            weight.mul_(mask.density**-0.5)
    return Network(model, 1 - result.sparsity, mixing(task, result.masks))


def mixing(task: Task, masks: dict[str, BlockMask]) -> int | None:
    """See `Network.mix`."""
    if task.name == "mnist":
        return layers_to_mix(cycle([masks["fc2"]]))
    if task.name == "lstm":
        mask = masks["lstm.weight_hh_l0"]
        units = mask.shape[1]
        keep = mask.keep.view(4, -1, mask.keep.shape[1]).any(0)  # by any of the gates
        return layers_to_mix(cycle([BlockMask(keep, (units, units), mask.block)]))
    mlp = [mask for name, mask in masks.items() if ".mlp." in name and "gate" not in name]
    return layers_to_mix(cycle(mlp))


class Data:
    """Samples of a task, in memory.

    Attributes:
        train: What is learned from.
        valid: Held out of it, to choose the learning rate by.
        test: What is reported.
    """

    def __init__(self, task: Task, folder: Path, device: str) -> None:
        self.task, self.device = task, device
        if task.name == "mnist":
            pictures, labels = _mnist(folder, "train")
            held = len(labels) // 12
            self.train: Any = pictures[:-held].to(device), labels[:-held].to(device)
            self.valid: Any = pictures[-held:].to(device), labels[-held:].to(device)
            self.test: Any = tuple(part.to(device) for part in _mnist(folder, "t10k"))
            return
        text = "\n".join(read_books(folder, "train")).encode()
        held = min(1_000_000, len(text) // 10)
        self.train = _bytes(text[:-held]).to(device)
        self.valid = self._windows(text[-held:])
        self.test = self._windows("\n".join(read_books(folder, "valid")).encode()[:1_000_000])

    def _windows(self, text: bytes) -> tuple[Tensor, Tensor]:
        size = self.task.length + 1
        rows = _bytes(text)[: len(text) // size * size].view(-1, size).to(self.device)
        return rows[:, :-1].long(), rows[:, 1:].long()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random batches, the same for every network of a seed."""
        draw = torch.Generator().manual_seed(seed)
        task = self.task
        while True:
            if task.name == "mnist":
                pick = torch.randint(len(self.train[1]), (task.batch,), generator=draw).to(self.device)
                yield self.train[0][pick], self.train[1][pick]
                continue
            start = torch.randint(len(self.train) - task.length, (task.batch, 1), generator=draw)
            rows = self.train[(start + torch.arange(task.length + 1)).to(self.device)].long()
            yield rows[:, :-1], rows[:, 1:]


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures `(n, 784)` float32 of mean 0 and deviation 1, and labels `(n,)`, from compressed IDX files."""
    contents = [
        lzma.decompress((folder / f"{part}-{name}-ubyte.xz").read_bytes())
        for name in ("images-idx3", "labels-idx1")
    ]
    pictures = torch.from_numpy(np.frombuffer(contents[0], np.uint8, offset=16).reshape(-1, 784).copy())
    labels = torch.from_numpy(np.frombuffer(contents[1], np.uint8, offset=8).copy())
    return (pictures.float() / 255 - 0.1307) / 0.3081, labels.long()
