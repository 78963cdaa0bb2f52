"""A sequential recommender (SASRec) with a block-sparse item table: what a user will want next, among all items.

Nearly all weights are that table, which is both looked up and, tied, the output's weight. Items are numbered by how
often they occur, so that a block holds neighbours in popularity, and rare items are left fewer features than frequent
ones.

Needs: an interaction log: lines of `user item`, both positive integers, in time order, such as Video.txt of
    github.com/pmixer/SASRec.pytorch (Amazon reviews of video games).
Command: python -m sparsify.recipes.sequential_recommender path/to/Video.txt --out path/to/networks
Outcome: see docs/benchmarks/domains.md.

Each user's last item is what is reported (the test part), the one before is the validation part, and all before that
is the training part (leave-one-out). Items that a user has had are not recommended again.

Source: Kang and McAuley, Self-Attentive Sequential Recommendation, 2018; the loss is a softmax over sampled items.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify import TiedEmbedding
from sparsify.errors import DataError
from sparsify.recipes import plain_modules
from sparsify.recipes.plain_modules import Length, Metrics

HISTORY = 50  # items of a user that are looked at
BATCH = 256
CANDIDATES = 1024  # items drawn for each batch, against which the right one is told
BEST = 10  # recommendations that are judged
PADDING = 0
Part = Literal["validation", "test"]


def read_log(file: Path) -> tuple[list[np.ndarray], int]:
    """Each user's items in time order, numbered from 1 by how often they occur in the training parts.

    Returns:
        `(T,)` int64 for each user with three items or more, and the number of items.

    Raises:
        DataError: If the file is missing, is no log, or no user has three items.
    """
    try:
        pairs = np.array([line.split() for line in file.read_text().splitlines()], dtype=np.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read interactions from {file}: {error}") from error
    if pairs.shape[1:] != (2,) or (pairs.size and pairs.min() < 1):
        raise DataError(f"{file} is no interaction log: a line is `user item`, two positive integers")
    order = pairs[:, 0].argsort(kind="stable")
    users, items = pairs[order].T
    bounds = [0, *(np.flatnonzero(np.diff(users)) + 1).tolist(), len(users)]
    histories = [items[start:end] for start, end in pairwise(bounds) if end - start >= 3]
    if not histories:
        raise DataError(f"{file}: no user has the three items that training, validation and test take")
    counts = np.bincount(np.concatenate([history[:-2] for history in histories]), minlength=items.max() + 1)
    known = np.unique(items)
    numbers = np.zeros(items.max() + 1, dtype=np.int64)
    numbers[known[np.argsort(-counts[known], kind="stable")]] = np.arange(1, len(known) + 1)
    return [numbers[history] for history in histories], len(known)


class Block(nn.Module):
    """Causal self-attention and a layer for each item by itself."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, width)` from the like."""
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)  # one head
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.drop(self.out(attended))
        return x + self.drop(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))


class SasRec(nn.Module):
    """Self-attention over a user's items.

    Args:
        items: Number of items; number 0 is padding, behind the last item of short histories.
        width: Features of an item.
        layers: Blocks.
        dropout: While training.
    """

    def __init__(self, items: int, width: int = 64, layers: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.items = TiedEmbedding(items + 1, width, padding_idx=PADDING)
        self.positions = nn.Embedding(HISTORY, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(layers)])
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)

    def states(self, history: Tensor) -> Tensor:
        """What is known of the user after each item, `(B, T, width)` of `history` `(B, T)`."""
        places = torch.arange(history.shape[1], device=history.device)
        x = self.drop(self.items(history) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, history: Tensor) -> Tensor:
        """Scores of all items after the last one of each history, `(B, items + 1)`."""
        last = (history != PADDING).sum(1) - 1
        states = self.states(history)[torch.arange(len(history), device=history.device), last]
        return self.items(states)


class SequentialRecommender(plain_modules.Domain):
    """The recommender with a log of interactions; see the module.

    Args:
        file: The log.
        width: Features of an item.
    """

    metric = "ndcg@10"
    targets = ("items",)
    dense = Length(4000, 2e-3)
    sparse = Length(4000, 1e-3)

    def __init__(self, file: Path, width: int = 64) -> None:
        self.histories, self.items = read_log(file)
        self.width = width

    def network(self) -> nn.Module:
        """A recommender."""
        return SasRec(self.items, self.width)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Histories, the item after each of their items, and items drawn at random; users of like activity together."""
        generator = np.random.default_rng(seed)
        train = [history[:-2][-HISTORY - 1 :] for history in self.histories]
        train = [history for history in train if len(history) > 1]
        while True:
            order = generator.permutation(len(train))
            lengths = np.array([len(train[user]) for user in order]) + generator.random(len(order))
            chunks = np.array_split(order[lengths.argsort()], max(1, len(order) // BATCH))
            for chunk in generator.permutation(len(chunks)):
                rows = padded([train[user] for user in chunks[chunk]])
                drawn = torch.from_numpy(generator.integers(1, self.items + 1, CANDIDATES))
                yield rows[:, :-1], rows[:, 1:], drawn

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], teacher: nn.Module | None) -> Tensor:
        """Cross-entropy of the next item among the drawn ones, and nearness to what a teacher thinks of them."""
        history, following, drawn = batch
        valid = following != PADDING
        scores = self.scores(network, history, following[valid], drawn, valid)
        own = functional.cross_entropy(
            scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        )
        if teacher is None:
            return own
        with torch.no_grad():
            taught = self.scores(teacher, history, following[valid], drawn, valid)
        return own + functional.kl_div(
            scores.log_softmax(1), taught.log_softmax(1), log_target=True, reduction="batchmean"
        )

    def scores(
        self, network: nn.Module, history: Tensor, right: Tensor, drawn: Tensor, valid: Tensor
    ) -> Tensor:
        """`(V, 1 + CANDIDATES)`: the right item's score, then those of the drawn, each standing for many others."""
        assert isinstance(network, SasRec)
        states = network.states(history)[valid]
        first = (states * network.items(right)).sum(1, keepdim=True)
        others = states @ network.items(drawn).t() + np.log(self.items / len(drawn))
        others = others.masked_fill(drawn == right.unsqueeze(1), -torch.inf)
        return torch.cat([first, others], dim=1)

    @torch.no_grad()
    def evaluate(self, network: nn.Module, part: Part = "test") -> Metrics:
        """`hr@10`, how often the item that a user took is among the ten best of all, and `ndcg@10`, 1 / log2(1 + rank).

        Args:
            network: Recommender, dense or block-sparse.
            part: `test` for each user's last item, `validation` for the one before.
        """
        ahead = 1 if part == "test" else 2
        device = next(network.parameters()).device
        ranks = []
        users = sorted(self.histories, key=len)
        for start in range(0, len(users), 512):
            chunk = users[start : start + 512]
            seen = [history[:-ahead] for history in chunk]
            scores = network(padded([history[-HISTORY:] for history in seen]).to(device))
            taken = torch.tensor([history[-ahead] for history in chunk], device=device)
            own = scores.gather(1, taken.unsqueeze(1))
            scores[:, PADDING] = -torch.inf
            scores.scatter_(1, padded(seen).to(device), -torch.inf)
            ranks.append((scores >= own).scatter(1, taken.unsqueeze(1), False).sum(1) + 1)
        rank = torch.cat(ranks).double()
        hit = rank <= BEST
        gain = torch.where(hit, 1 / (1 + rank).log2(), 0)
        return {f"ndcg@{BEST}": gain.mean().item(), f"hr@{BEST}": hit.double().mean().item()}

    def inputs(self) -> dict[str, Tensor]:
        """The users of 64 requests."""
        return {"history": padded([history[-HISTORY:] for history in self.histories[:64]])}


def padded(histories: list[np.ndarray]) -> Tensor:
    """Histories as `(B, longest)` int64, with `PADDING` behind short ones."""
    rows = np.full((len(histories), max(map(len, histories))), PADDING)
    for row, history in zip(rows, histories, strict=True):
        row[: len(history)] = history
    return torch.from_numpy(rows)


if __name__ == "__main__":
    plain_modules.command(SequentialRecommender, __doc__, sparsity=0.75, block="16x16")
