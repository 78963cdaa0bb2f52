"""Pictures of a compressed model: density by layer, masks, quality against sparsity, training loss.

Each function draws one figure and writes it; the file's suffix chooses the format (`.png`, `.svg`, `.pdf`). Figures
are made without pyplot: no window, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.blocks import BlockMask
from sparsify.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
KEPT, REMOVED, ACCENT = "#2f6f9f", "#e9edf1", "#c4572e"


def density_by_layer(density: Mapping[str, float], path: str | Path) -> Path:
    """Bar chart of each layer's density, in the given order, with their plain mean as a line.

    Args:
        density: Share of kept weights, 0 to 1, by layer name.
        path: File to write.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    need(density, "a layer's density")
    figure = new_figure(7.5, 1.2 + 0.24 * len(density))
    axes = figure.add_subplot()
    names = list(density)
    axes.barh(names, [100 * density[name] for name in names], color=KEPT, height=0.75)
    mean = 100 * sum(density.values()) / len(density)
    axes.axvline(mean, color=ACCENT, linewidth=1)
    axes.set_title(f"Density by layer (mean {mean:.1f} %)", loc="left")
    axes.set_xlabel("weights kept, %")
    axes.set_xlim(0, 100)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    return save_figure(figure, path)


def mask_pictures(masks: Mapping[str, BlockMask], path: str | Path, columns: int = 4) -> Path:
    """Each layer's block mask as a picture: one cell a block, dark where it is kept.

    Args:
        masks: Masks by layer name.
        path: File to write.
        columns: Pictures in a row.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    from matplotlib.colors import ListedColormap

    need(masks, "a mask")
    columns = min(columns, len(masks))
    rows = math.ceil(len(masks) / columns)
    figure = new_figure(3.2 * columns, 3.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    colors = ListedColormap([REMOVED, KEPT])
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, mask) in zip(grid, masks.items(), strict=False):
        axes.imshow(mask.keep.cpu().numpy(), cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(_short(name), fontsize=9, loc="left")
        size = f"{mask.shape[0]}x{mask.shape[1]} in {mask.block}, {100 * mask.density:.0f} % kept"
        axes.text(0, -0.04, size, transform=axes.transAxes, fontsize=8, va="top")
    return save_figure(figure, path)


def quality_by_sparsity(
    curves: Mapping[str, Mapping[float, float]],
    path: str | Path,
    *,
    quality: str,
    dense: float | None = None,
    log: bool = False,
) -> Path:
    """One line a method: quality against the share of weights removed.

    Args:
        curves: For each label, quality by sparsity (0 to 1).
        path: File to write.
        quality: What the vertical axis shows, such as `held-out perplexity`.
        dense: The dense model's quality, drawn as a level.
        log: Whether the vertical axis is logarithmic.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    need(curves, "a curve")
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for label, points in curves.items():
        sparsities = sorted(points)
        axes.plot([100 * s for s in sparsities], [points[s] for s in sparsities], marker="o", label=label)
    _finish_quality(axes, quality, dense, log)
    axes.set_xlabel("weights removed, %")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def quality_by_block(
    series: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    quality: str,
    dense: float | None = None,
    log: bool = False,
) -> Path:
    """Grouped bars: quality at one sparsity for several block shapes.

    Args:
        series: For each label (a bar colour), quality by block shape; all with the same shapes.
        path: File to write.
        quality: What the vertical axis shows.
        dense: The dense model's quality, drawn as a level.
        log: Whether the vertical axis is logarithmic.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    need(series, "a series")
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    shapes = list(next(iter(series.values())))
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(shapes))]
        bars = axes.bar(places, [values[shape] for shape in shapes], width * 0.94, label=label)
        axes.bar_label(bars, fmt=_digits, fontsize=7, padding=1)
    _finish_quality(axes, quality, dense, log)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_xlabel("block shape, out x in")
    # Bars may reach anywhere inside the axes, so the legend stands above them.
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series) + 1, borderaxespad=0
    )
    return save_figure(figure, path)


def loss_curve(losses: Mapping[str, Sequence[tuple[int, float]]], path: str | Path) -> Path:
    """Training (or evaluation) loss against optimizer steps.

    Args:
        losses: For each label, points `(step, loss in nats per token)` in order.
        path: File to write.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    need([points for points in losses.values() if points], "a loss")
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for label, points in losses.items():
        marker = "o" if len(points) < 20 else None  # a single point has no line
        axes.plot([step for step, _ in points], [loss for _, loss in points], marker=marker, label=label)
    axes.set_title("Loss", loc="left")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def sensitivity(curves: Mapping[str, Mapping[float, float]], path: str | Path, *, loss: str) -> Path:
    """One row a layer, one dot for each sparsity: by how much the loss rises when this layer alone is pruned.

    Args:
        curves: For each layer, rise of the loss by sparsity (0 to 1); all with the same sparsities.
        path: File to write.
        loss: What the loss is, such as `nats`.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw or the suffix is unknown.
    """
    from matplotlib import colormaps

    need(curves, "a layer's curve")
    figure = new_figure(7.5, 1.6 + 0.22 * len(curves))
    axes = figure.add_subplot()
    sparsities = sorted(next(iter(curves.values())))
    names = list(curves)
    # Logarithmic from a thousandth of the largest rise on, straight from there to zero; less than zero is noise.
    axes.set_xscale(
        "symlog", linthresh=max((max(c.values()) for c in curves.values()), default=0.0) / 1000 or 1.0
    )
    for index, sparsity in enumerate(sparsities):
        color = colormaps["viridis"](0.85 * (1 - index / max(1, len(sparsities) - 1)))
        rises = [max(0.0, curves[name][sparsity]) for name in names]
        axes.plot(rises, names, "o", color=color, label=f"{sparsity:.0%}", clip_on=False)
    axes.set_title(f"Rise of the loss when one layer is pruned, {loss}", loc="left", pad=24)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    # Dots may lie anywhere inside the axes, so the legend stands above them.
    axes.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(sparsities),
        borderaxespad=0,
        columnspacing=1,
        handletextpad=0,
    )
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish_quality(axes: Axes, quality: str, dense: float | None, log: bool) -> None:
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=1, linestyle="--", label=f"dense, {dense:.4g}")
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(quality)


def _digits(value: float) -> str:
    """Three digits, or all of a larger number's."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a finished figure; equal data give equal files.

    Raises:
        ConfigError: If the suffix is unknown.
    """
    from matplotlib import rc_context

    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"cannot draw {path.name}: the suffix must be one of {', '.join(FORMATS)}")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date, no version, no random ids.
    metadata = {".svg": {"Date": None}, ".png": {"Software": None}}.get(path.suffix)
    with rc_context({"svg.hashsalt": "sparsify"}):
        figure.savefig(path, dpi=150, metadata=metadata)
    return path


def need(data: object, what: str) -> None:
    """Refuses to draw nothing.

    Raises:
        ConfigError: If `data` is empty.
    """
    if not data:
        raise ConfigError(f"nothing to draw: give at least {what}")


def _short(name: str, length: int = 34) -> str:
    """The end of a long dotted name, which is what tells layers apart."""
    return name if len(name) <= length else "..." + name[-length + 3 :]
