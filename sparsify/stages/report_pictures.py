"""Pictures inside the report's page: line charts as SVG, masks as PNG, both as text that needs no file and no script.

Charts take their colours from the page's style sheet, so that they follow its light and dark scheme.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from html import escape

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# Sides of a chart and the margins of its axes, in its own units: about a pixel each on a telephone.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 44, 10, 10, 26
# A larger mask is averaged to this many cells a side.
MASK_CELLS = 128
# Kept blocks, red, green, blue: readable on white and on black. Removed ones are transparent.
KEPT = (0x3F, 0x86, 0xBD)
LEVELS = 16


def line_chart(
    points: Sequence[tuple[float, float]],
    label: str,
    number: Callable[[float], str],
    limits: tuple[float, float] | None = None,
) -> str:
    """A curve over optimizer steps.

    Args:
        points: `(step, value)` in order, at least one, all finite.
        label: What the curve is, for those who cannot see it.
        number: Writes a value at the vertical axis.
        limits: Least and largest value of that axis; the values' own by default.

    Returns:
        An `<svg>` element with the classes `grid`, `line` and `dot`.
    """
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = limits or (min(values), max(values))
    if high <= low:
        low, high = low - 0.5, high + 0.5

    def across(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = []
    for value in ticks(low, high):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(number(value))}</text>')
    for step in ticks(first, last):
        parts.append(
            f'<text x="{across(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{round(step)}</text>'
        )
    places = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in points)
    parts.append(f'<polyline class="line" points="{places}"/>')
    if len(points) < 20:
        parts += [
            f'<circle class="dot" cx="{across(step):.1f}" cy="{up(value):.1f}" r="2.5"/>'
            for step, value in points
        ]
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to `high`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def mask_picture(keep: Tensor) -> str:
    """A mask with one pixel a block, or, of a large one, with the share kept of several.

    Args:
        keep: `(R, C)` bool.

    Returns:
        A PNG as a `data:` address.
    """
    cells = keep.cpu().float()
    height, width = (min(side, MASK_CELLS) for side in cells.shape)
    if (height, width) != tuple(cells.shape):
        cells = adaptive_avg_pool2d(cells[None], (height, width))[0]
    levels = cells.mul(LEVELS - 1).round().byte()
    rows = b"".join(b"\0" + bytes(row) for row in levels.tolist())
    opacity = bytes(round(255 * level / (LEVELS - 1)) for level in range(LEVELS))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, content)
        for kind, content in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),  # 8 bits, colours of a palette
            (b"PLTE", bytes(KEPT) * LEVELS),
            (b"tRNS", opacity),
            (b"IDAT", zlib.compress(rows, 9)),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
