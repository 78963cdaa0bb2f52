"""The benchmark of small worlds: equal parameters, the same batches, and a page that says what the rows say."""

from __future__ import annotations

import io
import itertools
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench_small_worlds
from small_worlds import NETWORKS, PATTERNS, TASKS, Data, build, parameters, scaled
from small_worlds_page import as_markdown, results, verdict
from sparsify import BlockShape


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Pictures of ten bars, in MNIST's own files."""
    random = np.random.default_rng(0)
    for part, count in (("train", 600), ("t10k", 120)):
        labels = random.integers(0, 10, count, dtype=np.uint8)
        pictures = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for picture, label in zip(pictures, labels, strict=True):
            picture[2 * label + 4 : 2 * label + 6] = 250
        for name, content in (
            ("images-idx3", bytes(16) + pictures.tobytes()),
            ("labels-idx1", bytes(8) + labels.tobytes()),
        ):
            (tmp_path / f"{part}-{name}-ubyte.xz").write_bytes(lzma.compress(content, preset=0))
    return tmp_path


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """An archive of one book to learn from, and one to be tested on."""
    for part, words in (("train-0", 3000), ("valid", 600)):
        content = ("# Title: Bees\n\n-------\n" + "the bee hums over the heath. " * words).encode()
        with tarfile.open(tmp_path / f"books-{part}.tar.xz", "w:xz", preset=0) as archive:
            entry = tarfile.TarInfo("Somebody/Bees.md")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return tmp_path


@pytest.mark.parametrize("name", TASKS)
def test_networks_have_equally_many_parameters(name: str) -> None:
    task = TASKS[name] if name == "mnist" else scaled(TASKS[name], 0.2)
    dense, *others = (build(task, kind, seed=1) for kind in NETWORKS if kind != "dense_wide")
    block = BlockShape.parse(task.block)
    for network in others:
        assert abs(parameters(network.model) - parameters(dense.model)) <= block.numel * 8 * max(
            1, task.layers
        )
        assert 0 < network.density < 1
    with torch.no_grad():
        x = torch.randn(3, 784) if name == "mnist" else torch.randint(256, (3, 8))
        spread = {kind: build(task, kind, seed=1).model(x).std() for kind in NETWORKS}
    # Weights of sparse layers are drawn so that signals do not fade.
    assert all(0.3 < value / spread["dense_wide"] < 3 for value in spread.values())


def test_patterns_differ_and_seeds_too() -> None:
    task = TASKS["mnist"]
    masks = {}
    for kind, seed in itertools.product(PATTERNS, (0, 1)):
        masks[kind, seed] = build(task, kind, seed).model.fc2.mask.keep  # pyright: ignore
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks.values(), 2))
    assert torch.equal(build(task, "watts_strogatz", 1).model.fc2.mask.keep, masks["watts_strogatz", 1])  # pyright: ignore


def test_batches_are_those_of_the_seed_and_leave_the_held_out_alone(mnist: Path, books: Path) -> None:
    task = scaled(TASKS["lstm"], 0.05)
    data = Data(task, books, "cpu")
    first, same, other = (next(data.batches(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], same[0]) and not torch.equal(first[0], other[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    assert data.valid[0].shape[1] == task.length and len(data.test[0]) > 10
    pictures = Data(scaled(TASKS["mnist"], 0.05), mnist, "cpu")
    assert len(pictures.train[1]) == 550 and len(pictures.valid[1]) == 50 and len(pictures.test[1]) == 120


def test_trains_writes_and_goes_on(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "--mnist",
        str(mnist),
        "--task",
        "mnist",
        "--scale",
        "0.02",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    few = [*arguments, "--network", "dense", "--network", "watts_strogatz", "--seeds"]
    bench_small_worlds.main([*few, "1"])
    rows = json.loads((tmp_path / "small-worlds.json").read_text())["rows"]
    assert [(row["network"], row["rate"]) for row in rows] == [
        (kind, rate) for kind in ("dense", "watts_strogatz") for rate in TASKS["mnist"].rates
    ]
    assert all(row["test"]["error"] < 0.5 for row in rows if row["rate"] == 3e-3)  # it learns: chance is 0.9
    bench_small_worlds.main([*few, "2"])
    again = json.loads((tmp_path / "small-worlds.json").read_text())["rows"]
    assert again[: len(rows)] == rows and [row["seed"] for row in again[len(rows) :]] == [1, 1]
    page = (tmp_path / "small-worlds.md").read_text()
    assert "Watts-Strogatz" in page and page.count("Not measured yet.") == 2
    assert (tmp_path / "small-worlds.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["lstm", "lm"])
def test_language_tasks_learn(name: str, books: Path) -> None:
    task = scaled(TASKS[name], 0.05)
    row = bench_small_worlds.train(task, Data(task, books, "cpu"), "watts_strogatz", 0, 1e-2)
    assert row["test"]["loss"] < 3.2 and row["valid"]["error"] < 0.9  # uniform bytes: 5.5
    assert 0 < row["density"] < 1


def row(network: str, seed: int, rate: float, error: float, valid: float = 0.1) -> dict[str, Any]:
    return {
        "task": "mnist", "network": network, "seed": seed, "rate": rate, "parameters": 1000, "density": 0.5, "mix": 2,
        "steps": 10, "seconds": 1.0, "valid": {"loss": valid, "error": 0.1}, "test": {"loss": 0.1, "error": error},
    }  # fmt: skip


def test_verdict_follows_from_the_numbers() -> None:
    dense = [row("dense", seed, 1e-3, 0.10 + seed / 100) for seed in range(3)]
    better = [row("watts_strogatz", seed, 1e-3, 0.05 + seed / 100) for seed in range(3)]
    mixed = [row("random_blocks", seed, 1e-3, error) for seed, error in enumerate((0.09, 0.12, 0.11))]

    def said(*rows: dict[str, Any]) -> str:
        return verdict(results({"rows": list(rows)}, "mnist"), "test errors, %")

    assert said(*dense, *better).startswith("**The claim holds** (test errors, %): better")
    assert "Watts-Strogatz by 5" in said(*dense, *better)
    assert said(*dense, *mixed).startswith("**The claim does not hold**")
    assert "no clear difference: random" in said(*dense, *mixed)
    assert said(*dense, *better, *mixed).startswith("**The claim holds for some patterns**")
    worse = [dict(r, network="watts_strogatz", test={"loss": 1, "error": 0.5}) for r in better]
    assert said(*dense, *worse).startswith("**The claim does not hold**") and "worse than" in said(
        *dense, *worse
    )


def test_learning_rate_is_chosen_on_held_out_data_alone() -> None:
    rows = [
        row("dense", 0, 1e-3, 0.05, valid=0.3),
        row("dense", 0, 3e-3, 0.2, valid=0.2),
        row("dense", 1, 3e-3, 0.3),
    ]
    found = results({"rows": rows}, "mnist")["dense"]
    assert found.values == [20.0, 30.0]
    page = as_markdown({"rows": rows, "machines": {"mnist": "a computer"}})
    assert "| dense, narrow | 1,000 | 0.500 | 2 | 25.000 ± 7.071 | 0.003 | 2 | 1 |" in page
