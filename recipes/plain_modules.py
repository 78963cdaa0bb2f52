"""What recipes of plain `nn.Module`s share: a dense network is trained, then pruned step by step, and saved.

YAML recipes compress checkpoints of transformers. A network of one's own comes with its own data, loss and metric: a
`Domain` holds them, `compress` does the rest with nothing but sparsify's Python interface, and `command` is the command
line of a recipe.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsify
from sparsify.measure import bytes_on_disk, compare_latency, environment, parameter_count

Metrics = dict[str, float]
# Share of the pruning run's steps that are a warm-up of the learning rate.
WARMUP = 0.05


@dataclass(frozen=True)
class Length:
    """How long and how fast a network trains.

    Attributes:
        steps: Optimizer steps.
        rate: Highest learning rate.
        weight_decay: Of AdamW.
    """

    steps: int
    rate: float
    weight_decay: float = 0.01


class Domain(ABC):
    """A network with its data, loss and metric.

    Attributes:
        metric: Key of the metric that counts, higher is better.
        targets: What is pruned (see `sparsify.prune`).
        dense: Training of the dense network.
        sparse: Training in which blocks go and what is left heals.
        until: Share of that training after which the masks are fixed.
    """

    metric: str
    targets: Sequence[str] | None = None
    dense: Length
    sparse: Length
    until: float = 0.5

    @abstractmethod
    def network(self) -> nn.Module:
        """A dense network, to be trained; its weights are drawn anew unless they are given."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches of the training part, without end."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], teacher: nn.Module | None) -> Tensor:
        """What is minimised; the trained dense network is the teacher while the sparse one trains."""

    @abstractmethod
    def evaluate(self, network: nn.Module) -> Metrics:
        """Metrics on the part that is reported."""

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of one request, to time it."""


def train(
    domain: Domain,
    network: nn.Module,
    length: Length,
    seed: int = 0,
    teacher: nn.Module | None = None,
    pruning: dict[str, Any] | None = None,
) -> nn.Module:
    """Trains a network in place: AdamW, a warm-up and a cosine; with `pruning`, blocks go on the way.

    Args:
        domain: Where data and loss come from.
        network: What is trained, on its device.
        length: How long.
        seed: Of the batches and of dropout.
        teacher: Handed to the loss.
        pruning: `block`, `sparsity` and other settings of `sparsify.SparsifyLoop`; pruned layers are packed at the end.

    Returns:
        `network`, in evaluation mode.
    """
    torch.manual_seed(seed)
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=length.rate, weight_decay=length.weight_decay)
    warmup = max(1, round(WARMUP * length.steps))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, length.steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    loop = None
    if pruning is not None:
        loop = sparsify.SparsifyLoop(
            network, optimizer, steps=length.steps, targets=domain.targets, until=domain.until, **pruning
        )
    network.train()
    batches = domain.batches(seed)
    for _ in range(length.steps):
        loss = domain.loss(network, tuple(part.to(device) for part in next(batches)), teacher)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if loop is not None:
        loop.finish()
    return network.eval()


def train_dense(domain: Domain, seed: int = 0, device: str = "cpu") -> nn.Module:
    """A trained dense network."""
    torch.manual_seed(seed)
    return train(domain, domain.network().to(device), domain.dense, seed)


def train_longer(domain: Domain, dense: nn.Module, seed: int = 0) -> nn.Module:
    """The dense network after as much more training as a sparse one gets, with the same teacher."""
    return train(domain, copy.deepcopy(dense), domain.sparse, seed + 1, teacher=dense)


def compress(domain: Domain, dense: nn.Module, block: str, sparsity: float, seed: int = 0) -> nn.Module:
    """A block-sparse network from a trained dense one, which stays as it is.

    Args:
        domain: Where data and loss come from.
        dense: Trained network.
        block: Block shape.
        sparsity: Share of the targets' elements to remove.
        seed: Of the training.
    """
    pruning = {"method": "magnitude", "block": block, "sparsity": sparsity}
    return train(domain, copy.deepcopy(dense), domain.sparse, seed + 1, teacher=dense, pruning=pruning)


def costs(domain: Domain, dense: nn.Module, sparse: nn.Module, folder: Path) -> dict[str, dict[str, float]]:
    """Saves both networks below a folder, and measures them side by side.

    Returns:
        For `dense` and `sparse`: `bytes` of the weight file, `parameters`, `latency_ms` of one request.
    """
    networks = {"dense": dense, "sparse": sparse}
    device = next(dense.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in domain.inputs().items()}
    seconds = compare_latency(networks, inputs, repeats=50)
    found = {}
    for name, network in networks.items():
        sparsify.save(network, folder / name, force=True)
        found[name] = {
            "bytes": bytes_on_disk(folder / name),
            "parameters": parameter_count(network),
            "latency_ms": 1e3 * seconds[name],
        }
    return found


def command(domain: Any, description: str | None, sparsity: float, block: str) -> None:
    """The command line of a recipe: data in, a dense and a sparse network and a report out.

    Args:
        domain: Called with the path of the data, it makes the `Domain`.
        description: Of the recipe.
        sparsity: Default share to remove.
        block: Default block shape.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="where the data is")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dense and the sparse network")
    parser.add_argument("--block", default=block, help="larger: faster on a GPU, and less accurate")
    parser.add_argument("--sparsity", type=float, default=sparsity, help="higher: smaller, faster")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        made = domain(args.data)
        dense = train_dense(made, args.seed, args.device)
        sparse = compress(made, dense, args.block, args.sparsity, args.seed)
        report: dict[str, Any] = costs(made, dense, sparse, args.out)
    except (sparsify.SparsifyError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for name, network in (("dense", dense), ("sparse", sparse)):
        report[name]["quality"] = made.evaluate(network)
    report |= {"block": args.block, "sparsity": args.sparsity, "environment": environment()}
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for name in ("dense", "sparse"):
        quality = ", ".join(f"{key} {value:.4f}" for key, value in report[name]["quality"].items())
        size, milliseconds = report[name]["bytes"] / 1e6, report[name]["latency_ms"]
        print(f"{name:7} {quality}; {size:.2f} MB, {milliseconds:.2f} ms")
