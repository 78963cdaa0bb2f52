"""The page and the picture of `bench_small_worlds.py`, made of its rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from small_worlds import DENSE, NETWORKS, PATTERNS, WIDE
from sparsify.plots import new_figure, save_figure

TITLES = {"mnist": "MLP on MNIST", "lstm": "byte LSTM on books", "lm": "byte Llama on books"}
NAMES = {
    DENSE: "dense, narrow",
    "random_blocks": "random",
    "balanced_random": "balanced random",
    "watts_strogatz": "Watts-Strogatz",
    "barabasi_albert": "Barabasi-Albert",
    WIDE: "dense, wide (more parameters)",
}
# What a task is judged by: words, and the number in a row's scores. Smaller is better.
METRICS: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
    "mnist": ("test errors, %", lambda scores: 100 * scores["error"]),
    "lstm": ("test bits per byte", lambda scores: scores["loss"] / math.log(2)),
    "lm": ("test bits per byte", lambda scores: scores["loss"] / math.log(2)),
}
INTRODUCTION = """\
Do larger layers with few blocks beat smaller dense ones of as many parameters? Each network below but the last is
trained from scratch with the same number of parameters, on the same batches; the wide ones store and multiply their
blocks alone. The learning rate of each is the better of two by the loss on data held out of the training set, with the
first seed. *Mixes in* is the number of layers (of the LSTM: time steps) with one layer's mask until every input reaches
every output. A claim is said to hold where every seed agrees."""
COMMAND = """\
python scripts/bench_small_worlds.py --mnist path/to/mnist --books path/to/classic-books \\
    --out docs/benchmarks"""


class Result(NamedTuple):
    """A network's trainings with its chosen learning rate.

    Attributes:
        rows: One a seed, ascending.
        values: The task's metric of each.
    """

    rows: list[dict[str, Any]]
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean of the metric over the seeds."""
        return statistics.fmean(self.values)


def results(report: dict[str, Any], task: str) -> dict[str, Result]:
    """For each network that has been trained, its rows with the better learning rate."""
    metric = METRICS[task][1]
    found: dict[str, Result] = {}
    for network in NETWORKS:
        own = [row for row in report["rows"] if (row["task"], row["network"]) == (task, network)]
        if own:
            first = min((row for row in own if row["seed"] == 0), key=lambda row: row["valid"]["loss"])
            kept = sorted((r for r in own if r["rate"] == first["rate"]), key=lambda row: row["seed"])
            found[network] = Result(kept, [metric(row["test"]) for row in kept])
    return found


def verdict(found: dict[str, Result], metric: str) -> str:
    """Whether the claim holds in one task, in a sentence."""
    if DENSE not in found:
        return "The narrow dense network has not been trained."
    dense = found[DENSE]
    better, worse, even = [], [], []
    for network in PATTERNS:
        if network in found:
            gaps = [own - other for own, other in zip(found[network].values, dense.values, strict=False)]
            (better if max(gaps) < 0 else worse if min(gaps) > 0 else even).append(network)
    said = []
    for networks, words in ((better, "better"), (worse, "worse")):
        if networks:
            named = ", ".join(f"{NAMES[n]} by {abs(found[n].mean - dense.mean):.3g}" for n in networks)
            said.append(f"{words} than the narrow dense network with every seed: {named}")
    if even:
        said.append(f"no clear difference: {', '.join(NAMES[n] for n in even)}")
    claim = "**The claim holds**" if better and not worse and not even else "**The claim does not hold**"
    if better and (worse or even):
        claim = "**The claim holds for some patterns**"
    return f"{claim} ({metric}): {'; '.join(said)}."


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def as_markdown(report: dict[str, Any]) -> str:
    """The page: for each task the verdict and a table."""
    lines = ["# Small worlds", "", INTRODUCTION, "", "```bash", COMMAND, "```", ""]
    lines += ["![Metric of every training, by network](small-worlds.png)", ""]
    for task, title in TITLES.items():
        found = results(report, task)
        if not found:
            lines += [f"## {title[0].upper()}{title[1:]}", "", "Not measured yet.", ""]
            continue
        metric = METRICS[task][0]
        first = next(iter(found.values())).rows[0]
        lines += [
            f"## {title[0].upper()}{title[1:]}", "", verdict(found, metric), "",
            f"{report['machines'][task]}; {first['steps']:,} steps; mean and standard deviation over the seeds.", "",
            f"| network | parameters | density | mixes in | {metric} | learning rate | seeds | seconds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for network, result in found.items():
            row = result.rows[0]
            cells = [
                NAMES[network], f"{row['parameters']:,}", f"{row['density']:.3f}", row["mix"] or "never",
                _spread(result.values), f"{row['rate']:g}", len(result.rows),
                f"{statistics.median(r['seconds'] for r in result.rows):.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> Path:
    """One panel a task: a dot for each training, a bar for the mean, and what the network mixes in."""
    tasks = [task for task in TITLES if results(report, task)]
    figure = new_figure(4.6 * len(tasks), 3.4)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        found = results(report, task)
        for place, (network, result) in enumerate(found.items()):
            colour = {DENSE: "black", WIDE: "grey"}.get(network, "tab:blue")
            axes.plot(result.values, [place] * len(result.values), "o", color=colour, alpha=0.6, markersize=5)
            axes.plot([result.mean], [place], "|", color=colour, markersize=16, markeredgewidth=2)
        if DENSE in found:
            axes.axvline(found[DENSE].mean, color="black", linewidth=0.8, linestyle=":")
        labels = [
            NAMES[network].replace(" (more", "\n(more")
            + ("" if network in (DENSE, WIDE) else f"\nmixes in {result.rows[0]['mix'] or 'never'}")
            for network, result in found.items()
        ]
        axes.set_yticks(range(len(found)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(METRICS[task][0])
        axes.set_title(TITLES[task], fontsize=10)
    return save_figure(figure, path)
