"""A transformers model with LSTM layers goes through the command line and the checkpoint format like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import EncodecConfig, EncodecModel
from typer.testing import CliRunner

from sparsify.cli.main import app
from sparsify.layers.recurrent import BlockSparseLSTM
from sparsify.layers.swap import sparse_modules


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_audio_codec_with_lstms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = EncodecConfig(
        num_filters=4, hidden_size=32, codebook_size=16, upsampling_ratios=[2, 2], num_lstm_layers=2
    )
    EncodecModel(config).save_pretrained(tmp_path / "dense")
    invoke("prune", tmp_path / "dense", "--out", tmp_path / "sparse", "--block", "8x16", "--sparsity", "0.5")
    listed = json.loads(invoke("inspect", tmp_path / "sparse", "--json").stdout)["layers"]
    assert {layer["kind"] for layer in listed} == {"lstm"} and len(listed) == 8
    assert "encoder.layers.7.lstm.weight_hh_l1" in {layer["name"] for layer in listed}

    sparse = EncodecModel.from_pretrained(tmp_path / "sparse")
    modules = sparse_modules(sparse)
    assert {type(module) for module in modules.values()} == {BlockSparseLSTM} and len(modules) == 2
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        expected = sparse.encoder(x)
        invoke("densify", tmp_path / "sparse", "--out", tmp_path / "again")
        dense = EncodecModel.from_pretrained(tmp_path / "again")
        assert isinstance(dense.encoder.layers[7].lstm, torch.nn.LSTM)
        torch.testing.assert_close(dense.encoder(x), expected)
        half: Any = EncodecModel.from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16)
        assert half.encoder.layers[7].lstm.weight_hh_l0.dtype == torch.bfloat16
        assert half.encoder.layers[7].lstm.weight_hh_l0_col_indices.dtype == torch.int32
        torch.testing.assert_close(half.encoder(x.bfloat16()).float(), expected, rtol=0, atol=0.1)
    timed = json.loads(invoke("bench", tmp_path / "sparse", "--json", "--tokens", "4").stdout)
    assert {group["kind"] for group in timed["layers"]} == {"lstm"}
