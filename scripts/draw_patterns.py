"""Draws the fixed patterns, each with its mixing depth, for docs/pruners.md:

python scripts/draw_patterns.py --out docs/images/patterns.png
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from sparsify.blocks import BlockMask, BlockShape
from sparsify.patterns import layers_to_mix, pattern_mask
from sparsify.plots import mask_pictures

PATTERNS: dict[str, dict[str, object]] = {
    "random_blocks": {},
    "balanced_random": {},
    "banded": {},
    "watts_strogatz": {"rewire": 0.1},
    "barabasi_albert": {},
}
BLOCK = BlockShape(16, 16)


def draw(path: Path, side: int, sparsity: float) -> dict[str, int | None]:
    """Draws a mask of every pattern on a grid of `side x side` blocks; returns the layers each takes to mix."""
    pictures: dict[str, BlockMask] = {}
    depths: dict[str, int | None] = {}
    shape = side * BLOCK.rows, side * BLOCK.cols
    for method, options in PATTERNS.items():
        stack = (pattern_mask(method, shape, BLOCK, sparsity, str(i), **options) for i in count())
        depths[method] = layers_to_mix(stack)
        label = f"{method}: mixes in {depths[method]} layers"
        pictures[label] = pattern_mask(method, shape, BLOCK, sparsity, "0", **options)
    mask_pictures(pictures, path, columns=3)
    return depths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images/patterns.png"), help="picture to write")
    parser.add_argument("--side", type=int, default=48, help="blocks along each side of the grid")
    parser.add_argument("--sparsity", type=float, default=0.875, help="share of the blocks left out")
    args = parser.parse_args()
    for method, layers in draw(args.out, args.side, args.sparsity).items():
        print(f"{method:16} {layers}")


if __name__ == "__main__":
    main()
