"""Every figure is a file that shows the numbers it was given, the same for the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from sparsify import plots, plots_speed
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import ConfigError

BLOCK = BlockShape(16, 16)


def draw_density(path):
    return plots.density_by_layer(
        {"model.layers.0.mlp.up_proj": 0.25, "model.layers.0.mlp.down_proj": 0.75}, path
    )


def draw_masks(path):
    masks = {f"layer.{i}": BlockMask(torch.rand(4, 6) < 0.5, (60, 96), BLOCK) for i in range(5)}
    return plots.mask_pictures(masks, path, columns=2)


def draw_sparsity(path):
    return plots.quality_by_sparsity(
        {"magnitude": {0.5: 20.0, 0.0: 10.0}}, path, quality="perplexity", dense=10, log=True
    )


def draw_blocks(path):
    series = {"global": {"8x8": 3.0, "64x64": 2.0}, "layer": {"8x8": 2.5, "64x64": 1.0}}
    return plots.quality_by_block(series, path, quality="Spearman x 100", dense=4.0)


def draw_sensitivity(path):
    curves = {"a.q": {0.5: 0.1, 0.9: 2.0}, "a.k": {0.5: -0.01, 0.9: 0.4}}
    return plots.sensitivity(curves, path, loss="nats")


def draw_loss(path):
    return plots.loss_curve({"training": [(0, 5.0), (10, 4.0)], "held-out": [(10, 4.5)]}, path)


def draw_speedups(path):
    layers = {"a.up": {"1 token": 0.8, "256 tokens": 3.2}, "a.down (3 like it)": {"1 token": 1.1}}
    return plots_speed.speedups(layers, {"prefill of 256 tokens": {"CUDA graph": 2.0, "eager": 0.9}}, path)


def draw_tradeoff(path):
    points = [plots_speed.Point("32x32", 0.5, 1.4, 24.0), plots_speed.Point("64x64", 0.75, 2.6, 90.0)]
    panels = {
        "prefill of 256 tokens": (points, points, points[0]),
        "decoding after 8 tokens": (points, [], None),
    }
    return plots_speed.tradeoff(panels, path, quality="perplexity", dense=20.0, log=True)


DRAWINGS = [
    draw_density,
    draw_masks,
    draw_sparsity,
    draw_blocks,
    draw_loss,
    draw_sensitivity,
    draw_speedups,
    draw_tradeoff,
]


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_numbers_give_equal_files(draw, suffix, tmp_path):
    torch.manual_seed(1)
    first = draw(tmp_path / "new" / f"first{suffix}")
    torch.manual_seed(1)
    second = draw(tmp_path / f"second{suffix}")
    assert first.read_bytes() == second.read_bytes()
    if suffix == ".png":
        assert imread(first).std() > 0.02


def test_labels_are_in_the_picture(tmp_path):
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):  # text stays text
        density = draw_density(tmp_path / "density.svg").read_text()
        blocks = draw_blocks(tmp_path / "blocks.svg").read_text()
    assert "model.layers.0.mlp.up_proj" in density
    assert "mean 50.0 %" in density
    for text in ("8x8", "64x64", "global", "layer", "dense, 4", "Spearman x 100"):
        assert text in blocks


def test_what_speed_pictures_say(tmp_path):
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        speedups = draw_speedups(tmp_path / "speedups.svg").read_text()
        tradeoff = draw_tradeoff(tmp_path / "tradeoff.svg").read_text()
    for text in (
        "a.down (3 like it)",
        "1 token<",
        "256 tokens",
        "whole model, CUDA graph",
        "whole model, eager",
    ):
        assert text in speedups
    for text in ("32x32, 50%", "75% removed", "dense, 20", "decoding after 8 tokens", "perplexity"):
        assert text in tradeoff
    assert "64x64, 75%" not in tradeoff  # only the best choice is named
    with pytest.raises(ConfigError, match="nothing to draw"):
        plots_speed.speedups({}, {}, tmp_path / "a.png")


def test_a_mask_picture_has_a_dark_cell_for_each_kept_block(tmp_path):
    dark = {}
    for kept in (0, 6, 24):
        keep = torch.zeros(24, dtype=torch.bool)
        keep[:kept] = True
        path = plots.mask_pictures(
            {"layer": BlockMask(keep.view(4, 6), (64, 96), BLOCK)}, tmp_path / "mask.png"
        )
        color = np.array([int(plots.KEPT[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        dark[kept] = (np.abs(imread(path)[..., :3] - color) < 0.02).all(-1).sum()
    assert dark[0] == 0
    assert dark[6] / dark[24] == pytest.approx(0.25, abs=0.02)


def test_nothing_to_draw_and_an_unknown_suffix_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="nothing to draw"):
        plots.density_by_layer({}, tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"cannot draw a.bmp: the suffix must be one of .png"):
        draw_density(tmp_path / "a.bmp")
