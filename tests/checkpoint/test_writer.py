"""Writing is all or nothing: bad outputs are refused before the work, failures leave nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from sparsify.checkpoint import writer
from sparsify.checkpoint.quantizer import attach
from sparsify.errors import ConfigError, OutputError
from sparsify.layers.swap import convert
from tests.architectures.zoo import BY_NAME, prune

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model() -> Any:
    model = BY_NAME["llama"].build()
    masks, _ = prune(model, "32x32")
    convert(model, masks)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_a_checkpoint_holds(model: Any, tmp_path: Path) -> None:
    report = {"stages": [{"perplexity": 12.5}]}
    out = writer.save(model, tmp_path / "deep" / "out", recipe="version: 1\nname: ä\n", report=report)
    assert out == (tmp_path / "deep" / "out").resolve()
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "sparsify_recipe.yaml",
        "sparsify_report.json",
    }
    assert (out / "sparsify_recipe.yaml").read_text(encoding="utf-8") == "version: 1\nname: ä\n"
    assert json.loads((out / "sparsify_report.json").read_text()) == report
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_existing_output_is_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists: choose another folder, or pass --force"):
        writer.save(model, tmp_path / "out")
    assert contents(tmp_path) == {"out/notes.txt": b"mine"}


def test_empty_output_is_taken(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    out = writer.save(model, tmp_path / "out")
    assert (out / "config.json").is_file() and os.listdir(tmp_path) == ["out"]
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(OutputError, match="volume is a mount point, which cannot be replaced"):
        writer.save(model, tmp_path / "volume")


def test_force_replaces_a_checkpoint_and_nothing_else(model: Any, tmp_path: Path) -> None:
    BY_NAME["gpt2"].build().save_pretrained(tmp_path / "out")
    writer.save(model, tmp_path / "out", force=True)
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").model_type == "llama"
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="is no checkpoint, so it is not replaced"):
        writer.save(model, tmp_path / "home", force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_file_in_the_way(force: bool, model: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        writer.save(model, tmp_path / "out", force=force)
    assert (tmp_path / "out").read_text() == "mine"


def test_unwritable_parent(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the system's answer and not by permissions, which do not bind root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="cannot write to"):
        writer.save(model, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(OutputError, match="cannot write to"):
        writer.save(model, tmp_path / "parent" / "out")


def test_disk_too_small(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(type(model), "save_pretrained", lambda *args, **kwargs: written.append(args))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OutputError, match=r"needs about \d+ MB, but its disk has 1 MB left"):
        writer.save(model, tmp_path / "out")
    assert not written and not os.listdir(tmp_path)


def test_estimate_is_what_is_written(model: Any, tmp_path: Path) -> None:
    out = writer.save(model, tmp_path / "out")
    size = (out / "model.safetensors").stat().st_size
    assert writer.weight_bytes(model) <= size <= writer.weight_bytes(model) + 20_000


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "No space left on device")]
)
@pytest.mark.parametrize("old", [True, False], ids=["over-an-old-one", "new"])
def test_interruption_leaves_nothing(
    error: Any, old: bool, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of several weight files is being written when it happens."""
    if old:
        BY_NAME["gpt2"].build().save_pretrained(tmp_path / "out")
    before = contents(tmp_path)
    calls = []
    save_file = hf.modeling_utils.safe_save_file

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr(hf.modeling_utils, "safe_save_file", interrupted)
    expected = OutputError if isinstance(error, OSError) else error
    with pytest.raises(expected) as caught:
        writer.save(model, tmp_path / "out", force=old, max_shard_size="300KB")
    if isinstance(error, OSError):
        assert "No space left on device; nothing was left behind" in str(caught.value)
    assert len(calls) == 2
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if old else [])


def test_failing_rename_restores_the_old_one(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BY_NAME["gpt2"].build().save_pretrained(tmp_path / "out")
    before = contents(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        writer.save(model, tmp_path / "out", force=True)
    assert contents(tmp_path) == before


def test_link_to_a_checkpoint_is_followed(model: Any, tmp_path: Path) -> None:
    BY_NAME["gpt2"].build().save_pretrained(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    writer.save(model, tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert hf.AutoConfig.from_pretrained(tmp_path / "real").model_type == "llama"


def test_model_read_from_the_output_itself(model: Any, tmp_path: Path) -> None:
    """Loading maps files into memory; replacing them must not pull the weights away."""
    out = writer.save(model, tmp_path / "out")
    before = contents(out)
    loaded = hf.AutoModelForCausalLM.from_pretrained(out)
    writer.save(loaded, out, force=True)
    assert contents(out) == before


def test_dense_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = BY_NAME["llama"].build()
    writer.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_is_no_transformers_model(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot save dict: expected an nn\.Module"):
        writer.save({"weight": torch.ones(3)}, tmp_path / "out")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="not a transformers model"):
        attach(torch.nn.ModuleDict({"fc": model.model.layers[0].mlp.up_proj}))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="no block-sparse layer"):
        attach(BY_NAME["llama"].build())


def test_sentence_encoder_keeps_its_pooling(tmp_path: Path) -> None:
    """What sentence-transformers reads beside the weights comes along."""
    source = tmp_path / "source"
    hf.BertModel(BY_NAME["bert"].config()).save_pretrained(source)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 192}')
    model = hf.AutoModel.from_pretrained(source)
    masks, _ = prune(model, "32x32")
    convert(model, masks)
    out = writer.save(model, tmp_path / "out")
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert type(hf.AutoModel.from_pretrained(out)).__name__ == "BertModel"
