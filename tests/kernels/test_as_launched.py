"""Kernels compile with the arguments that their launchers give them, and fit the shared memory of each kind of GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("as_launched.py")
ROOT = Path(__file__).resolve().parents[2]
# Compute capability, and bytes of shared memory a multiprocessor: H200; A100; GeForce and RTX of three generations.
GPUS = {"90": 232448, "80": 166912, "86": 101376, "120": 101376}
# By kind of work; see `as_launched`.
CASES = {
    "recurrence": ["one-sequence", "many-units", "gru", "recurrence-fp32", "recurrence-tf32"],
    "conv": ["conv", "conv-one-pixel", "conv-many-positions", "conv-groups", "conv-small-fp32"],
    "conv-large": ["conv-large", "conv-flat"],
    "experts": ["one-slot", "one-expert", "decoding-experts", "many-experts", "small-experts"],
    "experts-large": ["large-experts"],
    "linear": ["linear-small", "linear-large", "linear-flat"],
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("kind", CASES)
def test_compiles_as_launched(kind: str, capability: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAM), capability, str(GPUS[capability]), *CASES[kind]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 3 * len(CASES[kind])
    for kernel in found:
        assert 0 <= kernel["shared"] <= GPUS[capability]
        assert max(kernel["grid"][1:]) < 1 << 16
