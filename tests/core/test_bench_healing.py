"""The benchmark of healing, on a small model: it compares before it times, and counts what is held."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bench_healing
from sparsify.errors import SparsifyError


@pytest.fixture
def small(monkeypatch):
    config = bench_healing.llama_1b(2)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    for key, value in (sizes | {"vocab_size": 96, "head_dim": 16}).items():
        setattr(config, key, value)
    monkeypatch.setattr(bench_healing, "VOCAB", 96)
    monkeypatch.setattr(bench_healing, "llama_1b", lambda layers: config)
    return config


def test_sizes_are_those_of_the_1b_model():
    with torch.device("meta"):
        model = LlamaForCausalLM(bench_healing.llama_1b(16))
    assert model.num_parameters() == 1_235_814_400


def test_rows_and_table(small: LlamaConfig, tmp_path):
    arguments = [
        "--device",
        "cpu",
        "--blocks",
        "16x16",
        "--sparsities",
        "0.75",
        "--batch",
        "2",
        "--length",
        "8",
    ]
    bench_healing.main([*arguments, "--repeats", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "healing-cpu.json").read_text())
    rows = {(row["precision"], row["form"]): row for row in record["rows"]}
    assert set(rows) == {(p, f) for p in bench_healing.PRECISIONS for f in bench_healing.FORMS}
    for precision in bench_healing.PRECISIONS:
        dense, masked, packed = (rows[precision, form] for form in bench_healing.FORMS)
        others = 4 * (96 * 64 + 5 * 64) * (4 if precision == "mixed" else 2)
        assert masked["weight_bytes"] == pytest.approx(dense["weight_bytes"], rel=1e-3)
        assert packed["weight_bytes"] - others == pytest.approx(
            0.25 * (dense["weight_bytes"] - others), rel=0.02
        )
        assert 0 < packed["errors"]["gradient"] < 0.03 or precision == "mixed"
    assert "| mixed | packed | 16x16 | 75% |" in (tmp_path / "healing-cpu.md").read_text()


def test_packed_gradients_that_differ_are_no_result(small: LlamaConfig, monkeypatch):
    arguments = [
        "--device",
        "cpu",
        "--blocks",
        "16x16",
        "--sparsities",
        "0.5",
        "--batch",
        "2",
        "--length",
        "8",
    ]
    make = bench_healing.Bench.make

    def wrong(self, form, *rest):
        model = make(self, form, *rest)
        if form == "packed":
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        return model

    monkeypatch.setattr(bench_healing.Bench, "make", wrong)
    with pytest.raises(SparsifyError, match="packed and masked differ"):
        bench_healing.main([*arguments, "--repeats", "1"])
