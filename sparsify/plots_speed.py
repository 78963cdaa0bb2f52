"""Pictures of speed: a model's layers and whole passes beside dense, and quality against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.plots import ACCENT, need, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"


def speedups(
    layers: Mapping[str, Mapping[str, float]],
    passes: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    title: str = "Speed-up over dense",
) -> Path:
    """One row a layer, a dot for each size of its input; below them one row for each pass of the whole model.

    Args:
        layers: For each layer, speed-up (2 is twice as fast) by the size of its input, in words, ascending.
        passes: For each pass, speed-up by the way of timing, the main one first.
        path: File to write.
        title: Of the picture.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    from matplotlib import colormaps

    need([*layers, *passes], "a layer's speed-up")
    picture = new_figure(7.5, 1.7 + 0.26 * (len(layers) + len(passes)))
    axes = picture.add_subplot()
    names = [*layers, *passes]
    counts = list(dict.fromkeys(count for row in layers.values() for count in row))
    for index, count in enumerate(counts):
        color = colormaps["viridis"](0.85 * (1 - index / max(1, len(counts) - 1)))
        known = [name for name, row in layers.items() if count in row]
        values = [layers[name][count] for name in known]
        axes.plot(values, [names.index(name) for name in known], "o", color=color, label=count)
    ways = list(dict.fromkeys(way for row in passes.values() for way in row))
    for index, way in enumerate(ways):
        known = [name for name, row in passes.items() if way in row]
        filled: dict[str, Any] = (
            {"color": ACCENT} if index == 0 else {"color": ACCENT, "markerfacecolor": "none"}
        )
        label = f"whole model, {way}"
        values = [passes[name][way] for name in known]
        axes.plot(values, [names.index(name) for name in known], "D", label=label, **filled)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, loc="left", pad=24 + 12 * ((len(counts) + len(ways) - 1) // 4))
    axes.grid(linewidth=0.3)
    _speed_axis(axes)
    axes.set_xlabel("times as fast as dense")
    axes.invert_yaxis()
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0,
        columnspacing=1, handletextpad=0, fontsize=8,
    )  # fmt: skip
    return save_figure(picture, path)


@dataclass(frozen=True)
class Point:
    """One pruned model.

    Attributes:
        block: Block shape.
        sparsity: Share of the weights removed, 0 to 1.
        speedup: Over dense.
        quality: In the measure of the vertical axis.
    """

    block: str
    sparsity: float
    speedup: float
    quality: float


def tradeoff(
    panels: Mapping[str, tuple[Sequence[Point], Sequence[Point], Point | None]],
    path: str | Path,
    *,
    quality: str,
    dense: float,
    log: bool = False,
) -> Path:
    """Quality against measured speed, one panel a workload: a colour a block shape, a sign a sparsity.

    Args:
        panels: For each workload all points, those of the front in order of speed, and the best choice if there is one.
        path: File to write.
        quality: What the vertical axis shows.
        dense: The dense model's quality; it stands at speed-up 1.
        log: Whether the vertical axis is logarithmic.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    from matplotlib import colormaps

    need(panels, "a workload")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    picture = new_figure(1.6 + 4.6 * columns, 4.3 * rows)
    grid = picture.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    points = [point for found, *_ in panels.values() for point in found]
    blocks = list(dict.fromkeys(point.block for point in points))
    sparsities = sorted({point.sparsity for point in points})
    colors = {block: colormaps["tab10"](index % 10) for index, block in enumerate(blocks)}
    signs = {sparsity: MARKERS[index % len(MARKERS)] for index, sparsity in enumerate(sparsities)}
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, (found, front, best)) in zip(grid, panels.items(), strict=False):
        axes.axhline(dense, color="black", linewidth=1, linestyle="--")
        axes.plot([1.0], [dense], "*", color="black", markersize=11)
        line = [(1.0, dense), *((point.speedup, point.quality) for point in front)]
        axes.plot(*zip(*line, strict=True), color="0.6", linewidth=1.2, zorder=0)
        for point in found:
            place = ([point.speedup], [point.quality])
            axes.plot(*place, signs[point.sparsity], color=colors[point.block], markersize=6)
        if best is not None:
            axes.plot([best.speedup], [best.quality], "o", color=ACCENT, fillstyle="none", markersize=14)
            axes.annotate(
                f"{best.block}, {best.sparsity:.0%}", (best.speedup, best.quality), xytext=(9, 8),
                textcoords="offset points", color=ACCENT, fontsize=9,
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("times as fast as dense, measured")
        axes.grid(linewidth=0.3)
        _speed_axis(axes)
        if log:
            _plain_logarithmic(axes)
    grid[0].set_ylabel(quality)
    handles: list[Any] = [grid[0].plot([], [], "o", color=colors[block], label=block)[0] for block in blocks]
    handles += [grid[0].plot([], [], signs[s], color="0.4", label=f"{s:.0%} removed")[0] for s in sparsities]
    handles += [grid[0].plot([], [], "*", color="black", label=f"dense, {dense:.4g}")[0]]
    handles += [grid[0].plot([], [], color="0.6", label="front")[0]]
    picture.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return save_figure(picture, path)


def _plain_logarithmic(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _speed_axis(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.1))
    wide = high / low > 6
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0,) if wide else (1.0, 1.25, 1.5, 1.75)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
