"""Anomalies in time series: an MLP forecasts each series, trained without labels, and where it is wrong is unusual.

Needs: the Numenta Anomaly Benchmark (github.com/numenta/NAB): a folder with data/*/*.csv and
    labels/combined_windows.json, or the same two with series of your own (columns timestamp, value).
Command: python -m sparsify.recipes.anomaly_detection path/to/nab --out path/to/networks
Outcome: see docs/benchmarks/domains.md.

The first half of each series is the training part: it trains the forecaster, sets each series' usual error, and
chooses the threshold. All that is reported is of the second half.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.errors import DataError
from sparsify.recipes import plain_modules
from sparsify.recipes.plain_modules import Length, Metrics

PAST, NEXT = 128, 16  # values read, and values forecast and judged together
LARGEST = 8.0  # standard deviations; what is beyond is no more unusual
BATCH = 256


@dataclass(frozen=True)
class Series:
    """One time series.

    Attributes:
        values: `(T,)` float32, standardised by the training part.
        unusual: `(T,)` bool, inside a labelled window.
        split: Length of the training part.
    """

    values: Tensor
    unusual: Tensor
    split: int


def read_series(folder: Path, first: float = 0.5) -> list[Series]:
    """Reads series and windows.

    Args:
        folder: Of the benchmark.
        first: Share of each series that is the training part.

    Raises:
        DataError: If there are no series or labels, or a series is too short.
    """
    labels = folder / "labels" / "combined_windows.json"
    try:
        windows = json.loads(labels.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read anomaly windows from {labels}: {error}") from error
    found = []
    for file in sorted((folder / "data").rglob("*.csv")):
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        try:
            values = np.array([float(row["value"]) for row in rows], dtype=np.float32)
            times = np.array([row["timestamp"] for row in rows], dtype="datetime64[s]")
        except (KeyError, ValueError) as error:
            raise DataError(f"{file} is no series with the columns timestamp and value: {error}") from error
        split = int(first * len(values))
        if split < PAST + NEXT:
            raise DataError(f"{file} has {len(values)} values, and {int((PAST + NEXT) / first)} are needed")
        mean, deviation = values[:split].mean(), values[:split].std()
        standard = np.clip((values - mean) / max(deviation, 1e-6), -LARGEST, LARGEST)
        unusual = np.zeros(len(values), dtype=bool)
        for start, end in windows.get(file.relative_to(folder / "data").as_posix(), ()):
            unusual |= (times >= np.datetime64(start[:19])) & (times <= np.datetime64(end[:19]))
        found.append(Series(torch.from_numpy(standard), torch.from_numpy(unusual), split))
    if not found:
        raise DataError(f"{folder / 'data'} holds no series (.csv)")
    return found


class Forecaster(nn.Module):
    """The next values of a series from those before; the last one counts as zero."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(PAST, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, width), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(width, NEXT)

    def forward(self, past: Tensor) -> Tensor:
        """`(B, NEXT)` of `past` `(B, PAST)`."""
        last = past[:, -1:]
        return self.head(self.body(past - last)) + last


class AnomalyDetection(plain_modules.Domain):
    """The forecaster with series and windows; see the module.

    Args:
        folder: Of the benchmark.
        width: Of the hidden layers.
    """

    metric = "average_precision"
    targets = ("body",)
    dense = Length(1500, 1e-3)
    sparse = Length(1500, 1e-3)

    def __init__(self, folder: Path, width: int = 512) -> None:
        self.series, self.width = read_series(folder), width

    def network(self) -> nn.Module:
        """A forecaster."""
        return Forecaster(self.width)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Past and next values `(B, PAST)`, `(B, NEXT)` from the training parts, long series more often."""
        windows = torch.cat([one.values[: one.split].unfold(0, PAST + NEXT, 1) for one in self.series])
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
            yield chosen[:, :PAST], chosen[:, PAST:]

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], teacher: nn.Module | None) -> Tensor:
        """Mean absolute error; what a teacher forecasts is no better than the truth."""
        past, following = batch
        return (network(past) - following).abs().mean()

    @torch.no_grad()
    def errors(self, network: nn.Module, one: Series) -> tuple[Tensor, Tensor, Tensor]:
        """Forecast errors of a series in stretches of `NEXT` values, over its usual error.

        Returns:
            Scores `(S,)`; which stretches touch a window, `(S,)` bool; which belong to the training part, `(S,)` bool.
        """
        device = next(network.parameters()).device
        windows = one.values.unfold(0, PAST + NEXT, NEXT)
        forecast = torch.cat([network(part[:, :PAST].to(device)).cpu() for part in windows.split(4096)])
        error = (forecast - windows[:, PAST:]).abs().mean(1)
        unusual = one.unusual.unfold(0, PAST + NEXT, NEXT)[:, PAST:].any(1)
        first = torch.arange(len(error)) * NEXT + PAST + NEXT <= one.split
        return error / error[first].median().clamp(min=1e-2), unusual, first

    def evaluate(self, network: nn.Module) -> Metrics:
        """Metrics of the second halves.

        Returns:
            `average_precision` of the scores of all stretches of all series; `f1`, `precision` and `recall` over
            windows at the threshold whose `f1` is the highest on the training parts: an alarm is a run of stretches
            above it, right if it touches a window, and a window is found if an alarm touches it; `positives`, the
            share of stretches in windows, which is what chance would score.
        """
        judged = [self.errors(network, one) for one in self.series]
        score, unusual, first = (torch.cat(parts) for parts in zip(*judged, strict=True))
        levels = score[first].quantile(torch.linspace(0.8, 0.999, 100))
        best = max(levels.tolist(), key=lambda level: alarms(judged, level, train=True)["f1"])
        return {
            "average_precision": average_precision(score[~first], unusual[~first]),
            **alarms(judged, best, train=False),
            "positives": unusual[~first].float().mean().item(),
        }

    def inputs(self) -> dict[str, Tensor]:
        """A thousand series at once."""
        return {"past": torch.randn(1000, PAST, generator=torch.Generator().manual_seed(0))}


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Area under precision over recall, `sum (R_n - R_n-1) P_n`; equal scores count together.

    Args:
        score: `(S,)`.
        positive: `(S,)` bool.
    """
    order = score.argsort(descending=True)
    score, hits = score[order], positive[order].double().cumsum(0)
    last = torch.cat([score[1:] != score[:-1], torch.tensor([True])])
    precision = (hits / torch.arange(1, len(hits) + 1))[last]
    recall = torch.cat([torch.zeros(1, dtype=torch.double), hits[last] / hits[-1].clamp(min=1)])
    return float((recall.diff() * precision).sum())


def alarms(judged: list[tuple[Tensor, Tensor, Tensor]], level: float, train: bool) -> Metrics:
    """`f1`, `precision` and `recall` over windows of the training parts, or of the other ones."""
    right = raised = found = windows = 0
    for score, unusual, first in judged:
        part = first if train else ~first
        high, inside = score[part] > level, unusual[part]
        for run in _runs(high):
            raised += 1
            right += bool(inside[run].any())
        for run in _runs(inside):
            windows += 1
            found += bool(high[run].any())
    precision, recall = right / max(1, raised), found / max(1, windows)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return {"f1": f1, "precision": precision, "recall": recall}


def _runs(flags: Tensor) -> list[slice]:
    """Where `flags` `(S,)` is true without a break."""
    change = torch.diff(
        flags.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)
    )
    starts, ends = (change == 1).nonzero().flatten().tolist(), (change == -1).nonzero().flatten().tolist()
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


if __name__ == "__main__":
    plain_modules.command(AnomalyDetection, __doc__, sparsity=0.75, block="16x16")
