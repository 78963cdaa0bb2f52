"""The recovery benchmark's own parts: every run is a valid recipe, and the page says what the rows say."""

from __future__ import annotations

import pytest

import bench_recovery
import sparsify
from recovery_page import as_markdown


@pytest.fixture
def options(tmp_path):
    given = [
        "--stsb",
        "dev.csv",
        "--sst2",
        "sst2",
        "--wikitext",
        "wiki.txt",
        "--books",
        "books",
        "--lm",
        "lm",
    ]
    return bench_recovery.parse([*given, "--encoder", "encoder", "--out", str(tmp_path)])


def test_every_run_is_a_valid_recipe_and_none_comes_twice(options, tmp_path):
    found = list(bench_recovery.cases())
    assert len(found) == len(set(found))
    for case in found:
        plain = bench_recovery.recipe(case, options, tmp_path, tmp_path / "out")
        recipe = sparsify.Recipe.from_dict(plain)
        assert recipe.seed == case.seed
        pruned = [s.sparsity for s in recipe.stages if s.stage == "prune"]
        pruned += [s.pruner.sparsity for s in recipe.stages if s.stage == "finetune" and s.pruner]
        assert pruned == ([] if case.masks == "control" else [case.sparsity])


def test_no_run_sees_more_than_a_fifth_of_the_tokens_the_language_model_was_trained_on(options, tmp_path):
    for case in (case for case in bench_recovery.cases() if case.task == "lm"):
        stages = bench_recovery.recipe(case, options, tmp_path, tmp_path)["stages"]
        trained = sum(s["steps"] * s["batch"] * 512 for s in stages if s["stage"] == "finetune")
        assert trained <= 0.2 * 6 * 52_498_432


def test_the_page_shows_means_ranges_and_the_change():
    rows = [
        {"task": "lm", "block": "64x64", "sparsity": 0.5, "masks": "block_obs", "seed": seed, "seconds": 60.0}
        | {
            "quality": {
                "dense": {"perplexity": 60.0},
                "pruned": {"perplexity": 100.0},
                "recovered": {"perplexity": value},
            }
        }
        for seed, value in enumerate((62.0, 63.0, 64.0))
    ]
    report = {
        "rows": rows,
        "workers": 3,
        "environment": {"gpu": [], "versions": {"torch": "2", "transformers": "5"}},
        "lm_sha256": "abc",
    }
    page = as_markdown(report)
    assert "Dense: 60.00." in page
    assert (
        "| block_obs | 64x64 | 50% | 100.00 (100.00-100.00) | 63.00 (62.00-64.00) | +5.0% | 3 | 60 |" in page
    )
