"""The way back: an ordinary dense checkpoint with bit-identical kept weights, under the architecture's own names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from sparsify.checkpoint import writer
from sparsify.checkpoint.densify import densify
from sparsify.errors import CheckpointError, OutputError
from sparsify.layers.swap import convert, sparse_modules
from tests.architectures.zoo import ARCHITECTURES, BY_NAME, Architecture, prune


def save_both(case: Architecture, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The dense model with zeros in `dense`, its packed form in `sparse`."""
    model = case.build().to(dtype)
    masks, _ = prune(model, case.block)
    model.save_pretrained(folder / "dense")
    convert(model, masks)
    writer.save(model, folder / "sparse")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ARCHITECTURES])
def test_round_trip_is_exact(case: Architecture, tmp_path: Path) -> None:
    save_both(case, tmp_path)
    densify(tmp_path / "sparse", tmp_path / "again")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_bfloat16(tmp_path: Path) -> None:
    save_both(BY_NAME["llama"], tmp_path, torch.bfloat16)
    densify(tmp_path / "sparse", tmp_path / "again")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def test_result_needs_no_package(tmp_path: Path) -> None:
    save_both(BY_NAME["gpt2"], tmp_path)
    densify(tmp_path / "sparse", tmp_path / "again")
    code = """
import sys
sys.modules["sparsify"] = None
import torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained("again", output_loading_info=True)
assert not any(report.values()), report
torch.save(model(torch.arange(3, 20)[None]).logits.detach(), "logits.pt")
"""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sparse = BY_NAME["gpt2"].load(tmp_path / "sparse")
    got = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got, sparse(torch.arange(3, 20)[None]).logits)


def test_dequantize_in_memory(tmp_path: Path) -> None:
    """transformers' own `model.dequantize()`."""
    case = BY_NAME["mixtral"]
    save_both(case, tmp_path)
    model = case.load(tmp_path / "sparse")
    model.dequantize()
    assert not sparse_modules(model)
    model.save_pretrained(tmp_path / "again")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert want.keys() == got.keys() and all(torch.equal(got[key], tensor) for key, tensor in want.items())
    dense = case.load(tmp_path / "dense")
    assert torch.equal(model(**case.batch()).logits, dense(**case.batch()).logits)


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    model = BY_NAME["llama"].build()
    masks, _ = prune(model, "32x32")
    convert(model, masks)
    writer.save(model, tmp_path / "sparse", tokenizer=tokenizer)
    densify(tmp_path / "sparse", tmp_path / "again")
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "again")("b").input_ids == [1]


def test_dense_source_is_refused(tmp_path: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="dense checkpoint already"):
        densify(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused(tmp_path: Path) -> None:
    save_both(BY_NAME["llama"], tmp_path)
    with pytest.raises(OutputError, match="exists"):
        densify(tmp_path / "sparse", tmp_path / "dense")
    densify(tmp_path / "sparse", tmp_path / "dense", force=True)
