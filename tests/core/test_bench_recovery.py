"""The recovery benchmark's own parts: every run is a valid recipe, and the page says what the rows say."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import bench_recovery
import reference_lm
import sparsify
from bench_recovery import CONTROL, DEFAULT, SCRATCH, SMALLER
from recovery_page import as_markdown, draw, speedups

TOKENS_OF_THE_REFERENCE = 2400 * 256 * 512


@pytest.fixture
def options(tmp_path):
    files = {"stsb": "dev.csv", "sst2": "sst2", "wikitext": "wiki.txt", "books": "books", "lm": "lm"}
    given = [part for key, value in files.items() for part in (f"--{key}", value)]
    return bench_recovery.parse([*given, "--encoder", "encoder", "--out", str(tmp_path)])


@pytest.fixture
def checkpoint(tmp_path):
    """A pruned model where the run with the same masks looks for it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(reference_lm.make_model().config)
    sparsify.prune(model, method="magnitude", block="64x64", sparsity=0.75)
    sparsify.save(model, tmp_path / "masks-64x64-0.75")
    return sparsify.masks_of(model)


def _trained(plain):
    stages = [stage for stage in plain["stages"] if stage["stage"] == "finetune"]
    return sum(stage["steps"] * stage["batch"] * stage.get("accumulate", 1) * 512 for stage in stages)


def test_every_run_is_a_valid_recipe_and_none_comes_twice(options, tmp_path, checkpoint):
    found = list(bench_recovery.cases())
    assert len(found) == len(set(found))
    for case in found:
        plain = bench_recovery.recipe(case, options, tmp_path, tmp_path / "out")
        recipe = sparsify.Recipe.from_dict(plain)
        assert recipe.seed == case.seed
        pruned = [s.sparsity for s in recipe.stages if s.stage == "prune"]
        pruned += [s.pruner.sparsity for s in recipe.stages if s.stage == "finetune" and s.pruner]
        assert pruned == ([] if case.change in (CONTROL, SMALLER) else [case.sparsity])


def test_the_aims_have_three_seeds_and_one_factor_is_changed_at_a_time_in_at_most_20_runs():
    found = list(bench_recovery.cases())
    aims = {(c.task, c.block, c.sparsity) for c in found if c.change == DEFAULT and c.seed > 0}
    assert {c for c in aims if c[0] == "encoder"} == {("encoder", *pair) for pair in bench_recovery.ENCODER}
    for aim in aims:
        assert {c.seed for c in found if (c.task, c.block, c.sparsity) == aim} == {0, 1, 2}
    ablations = [c for c in found if c.seed == 0 and c.change not in (CONTROL, SMALLER, SCRATCH)]
    ablations = [c for c in ablations if c.change != DEFAULT or (c.task, c.block, c.sparsity) not in aims]
    assert len(ablations) <= 20


def test_recovery_sees_at_most_a_fifth_of_the_tokens_that_the_language_model_was_trained_on(
    options, tmp_path
):
    for case in (case for case in bench_recovery.cases() if case.task == "lm"):
        trained = _trained(bench_recovery.recipe(case, options, tmp_path, tmp_path))
        if case.change in (SMALLER, SCRATCH):
            recovery = bench_recovery.TASKS["lm"].steps[case.sparsity] * 32 * 512
            assert abs(trained - TOKENS_OF_THE_REFERENCE - recovery) < 256 * 512
        else:
            assert 0 < trained <= 0.2 * TOKENS_OF_THE_REFERENCE


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_the_smaller_model_has_as_many_parameters_as_the_pruned_one_keeps(sparsity):
    dense = reference_lm.make_model()
    removed = sum(p.numel() for name, p in dense.named_parameters() if "proj" in name) * sparsity
    smaller = LlamaForCausalLM(bench_recovery.smaller_config(dense.config, sparsity))
    assert smaller.num_parameters() == pytest.approx(dense.num_parameters() - removed, rel=0.01)
    assert smaller.config.hidden_size < dense.config.hidden_size
    assert smaller.config.num_hidden_layers == dense.config.num_hidden_layers


def test_the_same_masks_are_found_again(tmp_path, checkpoint):
    model = reference_lm.make_model()
    settings = {"block": "64x64", "sparsity": 0.75, "scope": "global", "floor": 0.0}
    given = {"checkpoint": str(tmp_path / "masks-64x64-0.75")}
    found = sparsify.prune(model, method="bench_recovery:SameMasks", **given, **settings).masks
    assert set(found) == set(checkpoint)
    for name, mask in found.items():
        assert torch.equal(mask.keep, checkpoint[name].keep)


def _row(seed, value, change=DEFAULT, block="64x64"):
    quality = {"dense": {"perplexity": 60.0}, "pruned": {"perplexity": 100.0}}
    quality["recovered"] = {"perplexity": value}
    place = {"task": "lm", "block": block, "sparsity": 0.75, "change": change, "seed": seed}
    return place | {"seconds": 60.0, "parameters": 12_340_000, "quality": quality}


def test_the_page_shows_means_ranges_changes_and_shapes(tmp_path):
    rows = [_row(seed, value) for seed, value in enumerate((62.0, 63.0, 64.0))]
    rows += [_row(0, 66.0, "task loss alone"), _row(0, 61.0, block="16x16")]
    environment = {"gpu": [], "versions": {"torch": "2", "transformers": "5"}}
    report = {"rows": rows, "workers": 3, "environment": environment, "lm_sha256": "abc"}
    page = as_markdown(report)
    assert "Dense: 60.00." in page
    pruned = "100.00 (100.00-100.00)"
    aim = f"| default | 64x64 | 75% | {pruned} | 63.00 (62.00-64.00) | +5.0% | 12.3M | 3 | 60 |"
    beside = "| default | 64x64 | 75% | 100.00 | 62.00 | +3.3% | 12.3M | 1 | 60 |"
    changed = "| task loss alone | 64x64 | 75% | 100.00 | 66.00 | +10.0% | 12.3M | 1 | 60 |"
    assert page.index(aim) < page.index(beside) < page.index(changed)
    assert f"| 16x16 | 75% | 61.00 | +1.7% | {speedups(0.75)['16x16']:.2f} |" in page
    assert f"| 64x64 | 75% | 62.00 | +3.3% | {speedups(0.75)['64x64']:.2f} |" in page
    assert "![Quality against speed](recovery-lm.png)" in page
    draw(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recovery-lm.png"]
