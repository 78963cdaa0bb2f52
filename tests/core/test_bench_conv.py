"""scripts/bench_conv.py: what it measures, what it leaves out, and that it reports nothing that is wrong."""

import json
import os

import pytest
import torch

import bench_conv
from sparsify.bench.timing import race

SMALL = ["--device", "cpu", "--dtype", "float32", "--image", "32", "--batch", "1", "--repeats", "1"]


def test_measures_and_writes(tmp_path):
    bench_conv.main(
        [*SMALL, "--layers", "^(3x3 64|1x1 256-128)", "--blocks", "64x64", "--out", str(tmp_path)]
    )
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    rows = {(row["part"], row["layer"], row["sparsity"]): row for row in record["rows"]}
    assert {key[0] for key in rows} == {"forward", "training"}
    three = rows["forward", "3x3 64-64 /4", 0.9]
    assert three["masks"] == "each" and three["density"] == pytest.approx(
        1 / 9
    )  # one block: nothing to share
    assert rows["training", "1x1 256-128 /4", 0.5]["masks"] == "shared"
    assert ("forward", "1x1 256-128 /4", 0.9) in rows and record["left_dense"] == []
    for row in rows.values():
        assert row["speedup"] == pytest.approx(row["dense"] / row["sparse"]) and row["limit"] > 0
    summary = {(row["part"], row["kernel"], row["sparsity"]): row for row in record["summary"]}
    own = summary["forward", 1, 0.75]
    assert own["layers"] == 1 and own["mean"] == pytest.approx(own["together"])
    assert own["auto"] == pytest.approx(max(1.0, own["together"]))
    assert "| forward | 3x3 | 64x64 | 75% | 1 |" in file.with_suffix(".md").read_text()


def test_layers_with_too_few_blocks_are_named(tmp_path):
    bench_conv.main(
        [
            *SMALL,
            "--layers",
            "1x1 64-64",
            "--blocks",
            "64x64,128x128",
            "--sparsities",
            "0.75",
            "--out",
            str(tmp_path),
        ]
    )
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["rows"] == []
    assert record["left_dense"] == [f"1x1 64-64 /4 in {block} at 75%" for block in ("64x64", "128x128")]


def test_the_network_is_resnet_50():
    assert sum(layer.count for layer in bench_conv.RESNET50) == 52  # and the first one
    weights = sum(x.count * x.inputs * x.outputs * x.kernel**2 for x in bench_conv.RESNET50)
    assert weights == 23_445_504
    for layer in bench_conv.RESNET50:
        assert 56 % 2 ** (layer.shrink - 2) == 0


@pytest.mark.parametrize("what", ["output", "weight gradient"])
def test_a_wrong_result_is_an_error(what):
    place = {"device": "cpu", "dtype": torch.float32}
    layer = bench_conv.Layer(64, 64, 3, 1, 2, 1)
    sparse = bench_conv.make(layer, "16x16", 0.5, place)
    x = torch.randn(1, 64, 8, 8, requires_grad=True)
    bench_conv.check(sparse, x, True)
    if what == "output":
        forward = sparse.forward
        sparse.forward = lambda x: 1.001 * forward(x)
    else:
        sparse.weight.register_hook(lambda gradient: 1.001 * gradient)
    with pytest.raises(SystemExit, match=f"error: {what} of .* is off"):
        bench_conv.check(sparse, x, True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_search(monkeypatch, tmp_path):
    good = {"tile": 32, "step": 32, "warps": 4, "stages": 2}
    monkeypatch.setattr(bench_conv, "race", lambda calls, device, _: race(calls, device, 1))
    monkeypatch.setattr(bench_conv, "CHOICES", [good, good | {"tile": 24}])
    options = [
        "--part",
        "search",
        "--layers",
        "3x3 64",
        "--blocks",
        "64x64",
        "--sparsities",
        "0.9",
        "--image",
        "16",
    ]
    bench_conv.main([*SMALL, *options, "--out", str(tmp_path)])
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [entry["product"] for entry in record["search"]] == ["conv", "conv_dx", "conv_dw"]
    for entry in record["search"]:
        assert {key: entry["best"][0][key] for key in good} == good
