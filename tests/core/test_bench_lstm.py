"""The benchmark of recurrent layers: checked before it is timed, and a page made of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench_lstm


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_measures_and_writes(kind: str, tmp_path: Path) -> None:
    few = ["--hidden", "64", "--batch", "2", "--block", "16x16", "--steps", "3", "--repeats", "1"]
    bench_lstm.main([*few, "--kind", kind, "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)])
    report = json.loads((tmp_path / f"{kind}.json").read_text())
    assert [(row["mode"], row["sparsity"]) for row in report["rows"]] == [
        ("forward", 0.75), ("training", 0.75), ("forward", 0.9), ("training", 0.9)
    ]  # fmt: skip
    assert all(row["speedup"] == row["dense_ms"] / row["sparse_ms"] for row in report["rows"])
    page = (tmp_path / f"{kind}.md").read_text()
    assert page.startswith(f"# {kind.upper()} layers") and page.count("| 64 | 2 | 16x16 | 75% |") == 2


@pytest.mark.parametrize("fault", [1.01, float("nan")], ids=["scaled", "not-a-number"])
def test_wrong_layer_gets_no_time(fault: float) -> None:
    sparse, zeros, _ = bench_lstm.layers(torch.nn.LSTM, 64, "16x16", 0.75)
    x, dy = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    bench_lstm.check(sparse, zeros, x, dy, torch.float32)
    with torch.no_grad():
        sparse.get_parameter("weight_hh_l0").mul_(fault)
    with pytest.raises(SystemExit, match="no time is given"):
        bench_lstm.check(sparse, zeros, x, dy, torch.float32)
