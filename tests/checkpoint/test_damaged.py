"""Checkpoints that must be refused: by our reader before anything is loaded, and by plain `from_pretrained` too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from sparsify.checkpoint import reader, writer
from sparsify.errors import CheckpointError
from sparsify.layers.swap import convert
from tests.architectures.zoo import BY_NAME, prune

LAYER = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound checkpoints, made once."""
    folders = {}
    for name in ("llama", "mixtral"):
        torch.manual_seed(0)
        model = BY_NAME[name].build()
        masks, _ = prune(model, BY_NAME[name].block)
        convert(model, masks)
        folders[name] = writer.save(model, tmp_path_factory.mktemp("sound") / name)
        sharded = tmp_path_factory.mktemp("sound") / f"{name}-sharded"
        folders[f"{name}-sharded"] = writer.save(model, sharded, max_shard_size="300KB")
    return folders


@pytest.fixture
def sparse(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a sound checkpoint, to be damaged."""
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / "damaged"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, match: str) -> None:
    """Both ways in end with the same one-line error, the plain one before any layer has run."""
    for load in (hf.AutoModelForCausalLM.from_pretrained, reader.load, reader.open_checkpoint):
        with pytest.raises(CheckpointError, match=match) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def put(key: str, index: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[key].__setitem__(index, value)


def swap_columns(tensors: dict[str, torch.Tensor]) -> None:
    """Two blocks of the second row the wrong way round."""
    crow, col = tensors[f"{LAYER}.crow_indices"], tensors[f"{LAYER}.col_indices"]
    row = next(i for i in range(len(crow) - 1) if crow[i + 1] - crow[i] > 1)
    col[crow[row]], col[crow[row] + 1] = col[crow[row] + 1].clone(), col[crow[row]].clone()


def repeat_column(tensors: dict[str, torch.Tensor]) -> None:
    crow, col = tensors[f"{LAYER}.crow_indices"], tensors[f"{LAYER}.col_indices"]
    row = next(i for i in range(len(crow) - 1) if crow[i + 1] - crow[i] > 1)
    col[crow[row] + 1] = col[crow[row]]


CORRUPTIONS = {
    "column-too-large": (put(f"{LAYER}.col_indices", 0, 6), "must lie in 0..5"),
    "column-huge": (put(f"{LAYER}.col_indices", -1, 2**31 - 1), "must lie in 0..5"),
    "column-negative": (put(f"{LAYER}.col_indices", 3, -1), "must lie in 0..5"),
    "columns-unsorted": (swap_columns, "must ascend"),
    "column-repeated": (repeat_column, "must ascend"),
    "rows-start-late": (put(f"{LAYER}.crow_indices", 0, 1), "must rise from 0"),
    "rows-fall": (put(f"{LAYER}.crow_indices", 1, 40), "must rise from 0|must ascend"),
    "rows-negative": (put(f"{LAYER}.crow_indices", 1, -5), "must rise from 0"),
    "rows-end-early": (put(f"{LAYER}.crow_indices", -1, 2), "must rise from 0"),
    "rows-end-late": (put(f"{LAYER}.crow_indices", -1, 9999), "must rise from 0"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_indices(name: str, sparse: Callable[[str], Path]) -> None:
    corrupt, message = CORRUPTIONS[name]
    folder = sparse("llama")
    edit_tensors(folder, corrupt)
    refused(folder, f"corrupted block indices of {re.escape(LAYER)}.*({message})")


@pytest.mark.parametrize(
    ("key", "value"), [("down_proj_col_indices", 99), ("gate_up_proj_crow_indices", 2**30)]
)
def test_corrupted_indices_of_experts(key: str, value: int, sparse: Callable[[str], Path]) -> None:
    folder = sparse("mixtral")
    edit_tensors(folder, put(f"{EXPERTS}.{key}", 5, value))
    refused(folder, f"corrupted block indices of {re.escape(EXPERTS)}")


@pytest.mark.parametrize("part", ["weight", "crow_indices", "col_indices"])
def test_wrong_count(part: str, sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    edit_tensors(folder, lambda tensors: tensors.update({f"{LAYER}.{part}": tensors[f"{LAYER}.{part}"][:-1]}))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(LAYER)}.{part} has shape .* config.json announces"
    ):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["weight", "crow_indices", "col_indices"])
def test_missing_tensor(part: str, sparse: Callable[[str], Path]) -> None:
    """transformers makes up what is missing; for us that would be random weights or garbage indices."""
    folder = sparse("llama")
    edit_tensors(folder, lambda tensors: tensors.__delitem__(f"{LAYER}.{part}"))
    refused(folder, rf"no tensor {re.escape(LAYER)}\.{part}")


def test_indices_of_another_dtype(sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    key = f"{LAYER}.col_indices"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].long()}))
    refused(folder, "expected I32")


def entry(quantization: dict[str, Any]) -> dict[str, Any]:
    return quantization["layers"][LAYER]


CONFIG_FAULTS = {
    "version": (lambda q: q.update(format_version=2), "format version 2.*upgrade block-sparsify"),
    "no-layers": (lambda q: q.pop("layers"), "no `layers`"),
    "blocks-more": (lambda q: entry(q).update(blocks=entry(q)["blocks"] + 1), "config.json announces"),
    "blocks-too-many": (lambda q: entry(q).update(blocks=10_000), "integer from 0 to 66, got 10000"),
    "blocks-text": (lambda q: entry(q).update(blocks="all"), "got 'all'"),
    "block-shape": (lambda q: entry(q).update(block_shape=[48, 32]), "48x32 is not supported"),
    "block-shape-other": (lambda q: entry(q).update(block_shape=[64, 32]), "config.json announces"),
    "shape": (lambda q: entry(q).update(shape=[345, 192]), "its shape is"),
    "shape-rank": (lambda q: entry(q).update(shape=[344]), "list of 2 positive integers"),
    "kind-unknown": (lambda q: entry(q).update(kind="circulant"), "unknown kind 'circulant'"),
    "kind-other": (lambda q: entry(q).update(kind="conv1d"), "it is a conv1d layer there"),
    "entry": (lambda q: q["layers"].update({LAYER: 3}), "expected a mapping, got 3"),
    "unknown-module": (
        lambda q: q["layers"].update({"model.layers.7.mlp.up_proj": entry(q)}),
        r"names the block-sparse layer 'model\.layers\.7\.mlp\.up_proj', which LlamaForCausalLM does not have",
    ),
    "not-a-layer": (
        lambda q: q["layers"].update({"model.norm": entry(q)}),
        "layer 'model.norm' does not fit the model",
    ),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_config_that_does_not_fit(name: str, sparse: Callable[[str], Path]) -> None:
    fault, message = CONFIG_FAULTS[name]
    folder = sparse("llama")
    edit_config(folder, fault)
    with pytest.raises(CheckpointError, match=message) as caught:
        hf.AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_inspection_knows_its_version(sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    edit_config(folder, lambda quantization: quantization.update(format_version="1.1"))
    with pytest.raises(CheckpointError, match=r"format version '1\.1'"):
        reader.open_checkpoint(folder)


def test_missing_shard(sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama-sharded")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    message = r"lacks 1 of \d+ weight files .* model-00002-of"
    with pytest.raises(CheckpointError, match=message):
        reader.check_source(folder)
    with pytest.raises(CheckpointError, match=message):
        reader.load(folder)
    with pytest.raises((CheckpointError, OSError), match="model-00002-of"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=lambda kept: f"first-{kept}-bytes")
@pytest.mark.parametrize("name", ["llama", "llama-sharded"])
def test_truncated_file(name: str, kept: int, sparse: Callable[[str], Path]) -> None:
    folder = sparse(name)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, f"{file.name} is truncated")


def test_truncated_dense_checkpoint(tmp_path: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"truncated: \d+ bytes, but its header describes \d+"):
        reader.check_source(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[8,0]}}'],
)
def test_damaged_header(header: bytes, sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, "damaged safetensors header")


def test_pickle_is_not_read(sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickle weights"):
        reader.check_source(folder)
    with pytest.raises(CheckpointError, match="pickle"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_no_weights_at_all(sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        reader.load(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("someone/not-there", "neither a folder nor a checkpoint that the Hub gives us"),
    ],
)
def test_source_that_is_not_there(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        reader.check_source(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no config.json"), ("{", "is damaged"), ("[]", "no mapping")],
    ids=["missing", "half", "list"],
)
def test_config_file(content: str | None, message: str, sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        reader.load(folder)


def test_checkpoint_that_brings_its_own_code(sparse: Callable[[str], Path]) -> None:
    folder = sparse("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "modeling_own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="needs Python code"):
        reader.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    model = BY_NAME["llama"].build()
    reader.check_weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(CheckpointError, match=re.escape(f"weight {LAYER}.weight holds NaN or infinite")):
        reader.check_weights(model)


def test_damaged_index_in_training_is_refused(sparse: Callable[[str], Path]) -> None:
    """`load_state_dict`, by which Trainer resumes, checks as well."""
    folder = sparse("llama")
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    edit_tensors(folder, put(f"{LAYER}.col_indices", 0, 77))
    with pytest.raises(RuntimeError, match="corrupted block indices"):
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
