"""The benchmark of several GPUs, on a small model and two processes over gloo: it compares before it times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import Tensor

from tests.ranks import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import bench_multi_gpu

ARGUMENTS = [
    "--device",
    "cpu",
    "--shapes",
    "1B",
    "--prefill",
    "2x8",
    "--decode",
    "2",
    "--train",
    "4x8",
    "--repeats",
    "1",
]
MODES = {"prefill 2x8": 2, "decode 2 (no graph)": 2, "train 4x8": 4}


@pytest.mark.slow
def test_rows_and_table(tmp_path: Path):
    run_ranks(__file__, "", str(tmp_path))
    record = json.loads((tmp_path / "multi-gpu-cpu.json").read_text())
    rows = {(row["form"], row["work"], row["mode"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 2 * sum(MODES.values())
    for (form, work, mode), row in rows.items():
        assert row["gpus"] == (1 if mode == "one" else 2) and row["error"] < 1e-4
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["scaling"] == pytest.approx(rows[form, work, "one"]["seconds"] / row["seconds"])
        assert row["over_dense"] == pytest.approx(rows["dense", work, mode]["seconds"] / row["seconds"])
    assert "| 1B | sparse | train 4x8 | fsdp2 | 2 |" in (tmp_path / "multi-gpu-cpu.md").read_text()


@pytest.mark.slow
def test_outputs_that_differ_are_no_result(tmp_path: Path):
    with pytest.raises(AssertionError, match="several GPUs and one differ: logits by"):
        run_ranks(__file__, "broken", str(tmp_path))
    record = json.loads((tmp_path / "multi-gpu-cpu.json").read_text())
    modes = {(row["form"], row["work"].split()[0], row["mode"]) for row in record["rows"]}
    assert ("dense", "prefill", "one") in modes and (
        "sparse",
        "train",
        "fsdp2",
    ) in modes  # the others are measured
    assert not any(mode == "tp" for _, _, mode in modes)


def rank_main(what: str, out: str) -> None:
    bench_multi_gpu.SHAPES["1B"] = (128, 384, 8, 32, True, 2)
    bench_multi_gpu.VOCAB = 96
    if what == "broken":
        from sparsify.parallel import collectives

        def left_out(x: Tensor, group: object) -> Tensor:
            return x

        collectives.summed = left_out
    bench_multi_gpu.main([*ARGUMENTS, "--out", out])


if __name__ == "__main__":
    rank_main(sys.argv[1], sys.argv[2])
