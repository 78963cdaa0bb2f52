"""The benchmark of recurrent layers: checked before it is timed, and a page made of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench_lstm
import sparsify
from sparsify.bench.layers import groups, measure_group
from sparsify.bench.limits import Limits, flops_of
from sparsify.errors import SparsifyError


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
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths == {9}  # every row has a cell for each heading


@pytest.mark.parametrize("fault", [1.01, float("nan")], ids=["scaled", "not-a-number"])
def test_wrong_layer_gets_no_time(fault: float) -> None:
    sparse, zeros, _ = bench_lstm.layers(torch.nn.LSTM, 64, "16x16", 0.75)
    x, dy = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    bench_lstm.check(sparse, zeros, x, dy, torch.float32)
    with torch.no_grad():
        sparse.get_parameter("weight_hh_l0").mul_(fault)
    with pytest.raises(SystemExit, match="no time is given"):
        bench_lstm.check(sparse, zeros, x, dy, torch.float32)


def net(**options: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with an LSTM and a cell, block-sparse, and its dense skeleton."""

    def build() -> torch.nn.Module:
        return torch.nn.ModuleDict(
            {"rnn": torch.nn.LSTM(32, 48, **options), "cell": torch.nn.GRUCell(32, 48)}
        )

    torch.manual_seed(0)
    model = build()
    sparsify.prune(model, block=16, sparsity=0.5, scope="layer")
    with torch.device("meta"):
        return model, build()


@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_of_a_model_are_timed_against_the_dense_ones(batch_first: bool) -> None:
    model, skeleton = net(batch_first=batch_first)
    found = {group.kind: group for group in groups(model)}
    assert found.keys() == {"lstm", "gru_cell"} and found["lstm"].density == pytest.approx(0.5, abs=0.03)
    for group in found.values():
        rows = measure_group(group, skeleton, [1, 20], 1, lambda: None, Limits(1e12, 1e10))
        assert [row["tokens"] for row in rows] == [1, 20]
        assert all(row["error"] < 1e-5 and row["dense_us"] > 0 < row["sparse_limit_us"] for row in rows)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, skeleton = net()
    right = torch.nn.LSTM.forward
    monkeypatch.setattr(torch.nn.LSTM, "forward", lambda self, x: (right(self, x)[0] * 1.01, None))
    group = next(group for group in groups(model) if group.kind == "lstm")
    with pytest.raises(SparsifyError, match="rnn"):
        measure_group(group, skeleton, [20], 1, lambda: None, Limits(1e12, 1e10))


def test_arithmetic_of_stored_blocks_is_counted() -> None:
    model, _ = net()
    lstm = model["rnn"]  # pyright: ignore[reportIndexIssue]
    stored = lstm.weight_ih_l0.numel() + lstm.weight_hh_l0.numel()
    assert flops_of(lambda: lstm(torch.randn(5, 3, 32))) == 2 * 15 * stored
