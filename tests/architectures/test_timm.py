"""Models of timm, by themselves and in transformers' wrapper: what is pruned, what stays dense, and the outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.layers.swap import sparse_modules

timm = pytest.importorskip("timm")

MODELS = {
    "resnet18": {},
    "resnext50_32x4d": {},
    "convnext_atto": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "tf_efficientnet_b0": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_zeros(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dense, fresh = (timm.create_model(name, num_classes=5, **MODELS[name]).eval() for _ in range(3))
    dense.load_state_dict(model.state_dict())
    result = sparsify.prune(model, block="16x16", sparsity=0.5)
    sparsify.prune(dense, block="16x16", sparsity=0.5, convert=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense(images), rtol=1e-3, atol=1e-4)
    kinds = {type(module).__name__ for module in sparse_modules(model).values()}
    assert "BlockSparseConv2d" in kinds and result.sparsity == pytest.approx(0.5, abs=0.01)
    reasons = {kept.reason for kept in result.kept_dense}
    if "net" in name and not name.startswith("res"):
        assert any("depthwise" in reason for reason in reasons)
    sparsify.save(model, tmp_path / "sparse")
    loaded = sparsify.load(tmp_path / "sparse", model=fresh)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))
