"""The walkthrough of docs/inventing_a_pruner.py runs, and says what comes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "inventing_a_pruner.py"


def run(*options: object) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def held_out(said: str) -> dict[str, float]:
    return {label: float(value) for label, value in re.findall(r"'(\w+)': ([\d.]+)", said.splitlines()[-1])}


def test_the_walkthrough_runs_in_its_fast_setting(tmp_path: Path):
    words = re.sub(r"[^A-Za-z .,]", " ", (ROOT / "README.md").read_text())
    for part in ("train", "validation", "heldout"):
        (tmp_path / f"{part}.txt").write_text(words)
    said = run("--fast", "--corpus", tmp_path, "--images", tmp_path / "images")
    assert set(held_out(said)) == {"dense", "ours", "block_obs"}
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "inventing-masks.png", "inventing-quality.png"
    ]  # fmt: skip
    dense, sparse = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:dense|sparse)", said)[:2]
    )
    assert sparse < dense


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_invented_is_better_than_magnitude(tmp_path: Path):
    said = run("--corpus", tmp_path / "corpus", "--images", tmp_path / "images")
    at = dict(re.findall(r"^(magnitude|output share), 30% removed: (.*)$", said, re.MULTILINE))
    assert float(at["output share"]) < 0.2 * float(at["magnitude"])
    final = held_out(said)
    assert final["block_obs"] < final["ours"] < 3 * final["dense"]


def test_pictures_and_links_are_there():
    text = SCRIPT.read_text()
    for name in re.findall(r"\]\(images/([\w.-]+)\)", text):
        assert (ROOT / "docs" / "images" / name).is_file(), name
    assert "docs/inventing_a_pruner.py" in (ROOT / "README.md").read_text()
    assert "inventing_a_pruner.py" in (ROOT / "docs" / "pruners.md").read_text()
