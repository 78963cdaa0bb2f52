"""The pruner benchmark's own parts, and the pruners of others that it compares with."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import bench_pruners
import peers
from pruners_page import as_markdown
from sparsify.blocks import BlockShape
from sparsify.targets import select

BATCHES = [
    {"input_ids": torch.arange(64).view(4, 16) % 61},
    {"input_ids": torch.arange(64).view(4, 16) * 7 % 61},
]


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def output_error(dense: torch.nn.Module, pruned: torch.nn.Module) -> float:
    with torch.no_grad():
        pairs = [(dense(**b).logits, pruned(**b).logits) for b in BATCHES]
    return sum(float((a - b).square().mean()) for a, b in pairs)


@pytest.mark.parametrize("method", list(peers.PEERS))
def test_two_of_every_four_weights_go(method):
    model = llama()
    peers.prune(model, method, 0.5, "2:4", BATCHES)
    for layer in select(model, BlockShape(8, 8)).layers:
        assert (layer.weight.unflatten(1, (-1, 4)) == 0).sum(2).eq(2).all()


@pytest.mark.parametrize("method", list(peers.PEERS))
def test_single_weights_go_as_many_as_asked_for(method):
    model = llama()
    peers.prune(model, method, 0.75, "unstructured", BATCHES)
    layers = select(model, BlockShape(8, 8)).layers
    assert all(abs(float((layer.weight == 0).float().mean()) - 0.75) < 0.01 for layer in layers)
    if method == "wanda":  # of every output the same share
        assert all((layer.weight == 0).sum(1).unique().numel() == 1 for layer in layers)


def test_the_update_of_sparsegpt_pays():
    dense = llama()
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        model = copy.deepcopy(dense)
        peers.prune(model, method, 0.5, "unstructured", BATCHES)
        errors[method] = output_error(dense, model)
    assert errors["sparsegpt"] < 0.7 * errors["magnitude"]


def test_no_case_comes_twice_and_each_method_meets_each_shape():
    found = list(bench_pruners.cases())
    assert len(found) == len(set(found))
    for method in bench_pruners.ONE_SHOT:
        own = {c for c in found if c.method == method and c.block in bench_pruners.BLOCKS}
        assert len(own) == 2 * len(bench_pruners.BLOCKS) * len(bench_pruners.SPARSITIES)


def test_the_page_holds_means_and_ranges_of_both_models():
    rows = [
        {
            "model": "lm",
            "block": "32x32",
            "sparsity": 0.5,
            "method": "random_blocks",
            "seed": seed,
            "seconds": 1.0,
        }
        | {"books": books, "wikitext": 2e9, "peak_bytes": 3_000_000, "workers": 11}
        for seed, books in enumerate((100.0, 110.0, 120.0))
    ]
    rows += [
        {"model": "encoder", "block": block, "sparsity": 0.5, "method": "wanda", "seed": 0, "seconds": 2.0}
        | {"spearman": 71.25, "peak_bytes": 0, "workers": 14}
        for block in ("16x16", "1x1")
    ]
    report = {
        "rows": rows,
        "workers": 2,
        "dense": {"encoder": {"spearman": 86.7}, "lm": {"books": 63.8, "wikitext": 1180.0}},
        "environment": {"gpu": ["A GPU"], "versions": {"torch": "2", "transformers": "5"}},
        "lm_sha256": "abc",
    }
    page = as_markdown(report)
    assert "| random_blocks | 110.0 (100.0-120.0) / 2e+09 (2e+09-2e+09) | 1 | 3 |" in page
    assert "| wanda | 71.2 | 2 |  |" in page and "| wanda | 71.2 |  | 2 |  |" in page
    assert "with 11 to 14 cases running side by side" in page and "--workers 2 " in page
    assert "Dense: 63.8 / 1,180." in page and "`abc`" in page
