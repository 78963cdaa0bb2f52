"""The benchmark of a whole Llama, on a small one: its stack is transformers' model, it compiles once, it reports."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import bench_llama
from sparsify.errors import SparsifyError
from sparsify.layers.fusion import FusedMlp
from sparsify.layers.linear import BlockSparseLinear

SPARSE = bench_llama.Variant("16x16", 0.5)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> LlamaConfig:
    """Llama-3.1-8B's in small; what the benchmark takes for it."""
    config = bench_llama.llama_8b(3)
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    for key, value in (small | {"num_key_value_heads": 2, "head_dim": 16}).items():
        setattr(config, key, value)
    monkeypatch.setattr(bench_llama, "llama_8b", lambda layers: config)
    return config


@pytest.fixture
def bench(config: LlamaConfig) -> bench_llama.Bench:
    arguments = Namespace(device="cpu", dtype="float32", eager=True, context=5, repeats=2, tokens=40)
    with torch.no_grad():
        return bench_llama.Bench(config, arguments)


def _whole(bench: bench_llama.Bench, mlps: list[Any]) -> LlamaForCausalLM:
    """transformers' own model of the benchmark's parts."""
    model = LlamaForCausalLM(bench.config)
    for index, (layer, mlp) in enumerate(zip(bench.model.model.layers, mlps, strict=True)):
        layer.mlp = mlp
        layer.self_attn.layer_idx = index
    bench.config.num_hidden_layers = len(mlps)
    model.model.layers = bench.model.model.layers
    for name in ("embed_tokens", "norm"):
        setattr(model.model, name, getattr(bench.model.model, name))
    model.lm_head = bench.model.lm_head
    return model.eval()


def test_sizes_are_those_of_the_8b_model():
    with torch.device("meta"):
        model = LlamaForCausalLM(bench_llama.llama_8b(32))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


@torch.no_grad()
def test_prefill_and_decoding_are_those_of_the_model(bench):
    mlps = bench_llama.make_mlps(bench.model, bench.config, SPARSE)
    stack = bench_llama.Stack(bench.model, mlps, bench_llama._layer)
    prompt = torch.randint(97, (1, 5))
    _, hidden = stack.prefill(prompt)
    stack.prepare(context=5, length=12)
    stack.token[:] = 7
    caches = stack.caches
    tokens = [int((stack.decode(), stack.token)[1]) for _ in range(3)]
    keys = [(cache.keys[:, :, :5], cache.values[:, :, :5]) for cache in caches]

    model = _whole(bench, mlps)
    torch.testing.assert_close(model.model.norm(hidden), model.model(prompt).last_hidden_state)
    cache = StaticCache(config=bench.config, max_cache_len=12)
    model(prompt, past_key_values=cache, use_cache=True)
    for layer, (own_keys, own_values) in zip(cache.layers, keys, strict=True):
        layer.keys[:, :, :5], layer.values[:, :, :5] = own_keys, own_values
    expected, token = [], torch.full((1, 1), 7)
    for position in range(5, 8):
        logits = model(token, past_key_values=cache, position_ids=torch.tensor([[position]])).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        expected.append(int(token))
    assert tokens == expected


@torch.no_grad()
def test_every_layer_runs_the_same_compiled_code(bench, monkeypatch):
    graphs = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append({str(node.target) for node in module.graph.nodes})
        return module

    run = torch.compile(bench_llama._layer, fullgraph=True, dynamic=False, backend=backend)
    mlps = bench_llama.make_mlps(bench.model, bench.config, SPARSE)
    assert all(isinstance(mlp, FusedMlp) and type(mlp.gate_proj) is BlockSparseLinear for mlp in mlps)
    stacks = [bench_llama.Stack(bench.model, mlps, function) for function in (run, bench_llama._layer)]
    outputs = []
    for stack in stacks:
        torch.manual_seed(3)
        stack.prepare(4, 8)
        outputs.append([stack.decode()[1] for _ in range(2)])
    torch.testing.assert_close(*outputs)
    assert len(graphs) == 1 and "sparsify.gated" in graphs[0]


@torch.no_grad()
def test_a_wrong_kernel_stops_it(bench, monkeypatch):
    monkeypatch.setattr(
        BlockSparseLinear, "to_linear", lambda layer: torch.nn.Linear(layer.in_features, layer.out_features)
    )
    with pytest.raises(SparsifyError, match="nothing is reported"):
        bench.prefill([bench_llama.Variant(), SPARSE])


def test_runs_and_writes(config, tmp_path: Path, capsys):
    options = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--eager",
        "--repeats",
        "2",
        "--context",
        "5",
        "--tokens",
        "40",
    ]
    blocks = ["--decode-blocks", "16x16,32x8", "--prefill-blocks", "32x32"]
    bench_llama.main([*options, *blocks, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "llama-8b-cpu.json").read_text())
    found = [(row["part"], row["mlp"]) for row in record["rows"]]
    decoded = ["dense", "16x16, 50%", "16x16, 90%", "32x8, 50%", "32x8, 90%"]
    assert found == [(part, mlp) for part in ("memory", "decode") for mlp in decoded] + [
        ("prefill", "dense"),
        ("prefill", "32x32, 75%"),
    ]
    rows = {(row["part"], row["mlp"]): row for row in record["rows"]}
    assert rows["memory", "dense"]["share_of_dense"] == pytest.approx(1)
    assert rows["memory", "16x16, 90%"]["kept_gb"] < rows["memory", "16x16, 50%"]["kept_gb"]
    assert rows["decode", "dense"]["speedup"] == 1 and rows["decode", "16x16, 90%"]["bound"] > 1.3
    assert 0 < rows["prefill", "32x32, 75%"]["error"] < 1e-3
    assert "| prefill | 32x32, 75% |" in (tmp_path / "llama-8b-cpu.md").read_text()


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        bench_llama.main(["--only", "decode,training"])
    assert "unknown part 'training'" in capsys.readouterr().err
