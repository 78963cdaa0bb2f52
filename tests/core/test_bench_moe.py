"""scripts/bench_moe.py: what it measures, and that it reports nothing that is wrong."""

import json
import os

import pytest
import torch

import bench_moe

SMALL = ["--device", "cpu", "--dtype", "float32", "--layers", "tiny", "--repeats", "1", "--blocks", "32x32"]
PLACE = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_measures_and_writes(tmp_path):
    options = [
        "--part",
        "decode,prefill,training",
        "--prefill",
        "70",
        "--sparsities",
        "0.75",
        "--decode",
        "1,4",
    ]
    bench_moe.main([*SMALL, *options, "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    rows = {(row["part"], row["tokens"]): row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [("decode", 1), ("decode", 4), ("prefill", 70), ("training", 70)]
    assert rows["decode", 1]["hit"] == 2 and rows["prefill", 70]["hit"] == 8
    assert rows["prefill", 70]["implementation"] == rows["training", 70]["implementation"] == "grouped_mm"
    for row in rows.values():
        assert row["speedup"] == pytest.approx(row["dense"] / row["sparse"]) and row["limit"] > 0
    assert "| decode | tiny | 1 | 2 | 32x32 | 75% |" in file.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_layers_are_those_of_the_models(name):
    layer = bench_moe.LAYERS[name]
    with torch.device("meta"):
        dense = bench_moe.dense_experts(layer, {"device": "meta", "dtype": torch.bfloat16})
    assert dense.gate_up_proj.shape == (layer.experts, 2 * layer.inner, layer.hidden)
    assert type(dense).__name__.lower().startswith(name)


def test_masks_have_the_sparsity_and_the_limit_counts_hit_experts():
    layer = bench_moe.LAYERS["tiny"]
    sparse = bench_moe.sparse_experts(bench_moe.dense_experts(layer, PLACE), "32x32", 0.75)
    assert all(mask.density == 0.25 for mask in sparse.named_masks("experts").values())
    limits = bench_moe.Limits(flops=1e30, bytes=1e6)  # bytes alone count: a microsecond each
    index = torch.tensor([[3, 5], [5, 3]])
    inputs = torch.randn(2, layer.hidden), index, torch.ones(2, 2)
    weights = 4 * 2 * 0.25 * 3 * layer.hidden * layer.inner
    assert bench_moe.limit(sparse, inputs, limits, False) == pytest.approx(weights + 2 * inputs[0].nbytes)


def test_a_wrong_result_is_an_error():
    layer = bench_moe.LAYERS["tiny"]
    dense = bench_moe.dense_experts(layer, PLACE)
    sparse = bench_moe.sparse_experts(dense, "32x32", 0.5)
    inputs = bench_moe.routing(layer, 9, PLACE)
    with torch.no_grad():
        bench_moe.check(sparse, dense, inputs)
        forward = sparse.forward
        sparse.forward = lambda *inputs: 1.001 * forward(*inputs)
        with pytest.raises(SystemExit, match=r"error: the output of (.|\n)* is off"):
            bench_moe.check(sparse, dense, inputs)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_search(monkeypatch, tmp_path):
    good = {"tile": 16, "step": 64, "stages": 2}
    monkeypatch.setattr(bench_moe, "DECODE", [good, good | {"tile": 24}])
    monkeypatch.setitem(bench_moe.LAYERS, "tiny", bench_moe.Layer("tiny", 4, 2, 32, 32))
    options = ["--part", "search", "--prefill", "", "--decode", "1", "--sparsities", "0.5"]
    bench_moe.main([*SMALL, *options, "--out", str(tmp_path)])
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [(entry["product"], entry["tokens"]) for entry in record["search"]] == [("up", 1), ("down", 1)]
    for entry in record["search"]:
        assert {key: entry["best"][0][key] for key in good} == good
