"""`from_pretrained` and `save_pretrained` of plain transformers, with the options people pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from sparsify.checkpoint import reader, writer
from sparsify.checkpoint.quantizer import BlockSparseConfig
from sparsify.checkpoint.skeleton import build
from sparsify.errors import CheckpointError, ConfigError
from sparsify.layers.fusion import FusedMlp
from sparsify.layers.swap import convert, masks_of, sparse_modules
from tests.architectures.zoo import BY_NAME, prune


def save_sparse(name: str, folder: Path, **options: Any) -> Any:
    """Saves a half-empty model of an architecture and returns it, still dense with zeros."""
    model, sparse = BY_NAME[name].build(), BY_NAME[name].build()
    prune(model, BY_NAME[name].block)
    masks, _ = prune(sparse, BY_NAME[name].block)
    convert(sparse, masks)
    writer.save(sparse, folder, **options)
    return model


def logits(model: Any, name: str = "llama", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model(**BY_NAME[name].batch(dtype)).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_dtype_on_load_leaves_indices_alone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_sparse(name, tmp_path / "sparse")
    loaded = BY_NAME[name].load(tmp_path / "sparse", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for module in sparse_modules(loaded).values():
        indices = [b for key, b in module.named_buffers() if key.endswith("_indices")]
        assert indices and {b.dtype for b in indices} == {torch.int32}
    assert torch.isfinite(logits(loaded, name)).all()


def test_modules_kept_in_float32_stay_so(tmp_path: Path) -> None:
    """T5 overflows in float16 unless `wo` stays float32; its code reads `wo.weight.dtype`."""
    dense = save_sparse("t5", tmp_path / "sparse")
    loaded = BY_NAME["t5"].load(tmp_path / "sparse", dtype=torch.float16)
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wi_0.weight.dtype == torch.float16
    torch.testing.assert_close(logits(loaded, "t5").float(), logits(dense, "t5"), rtol=2e-2, atol=2e-2)


def test_dtype_reaches_a_body_of_another_class(tmp_path: Path) -> None:
    save_sparse("t5", tmp_path / "sparse")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "sparse", dtype=torch.float16)
    kept = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in loaded.named_parameters() if ".wo." in name}
    save_sparse("llama", tmp_path / "llama")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "llama", dtype=torch.float16)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(device_map: Any, tmp_path: Path) -> None:
    dense = save_sparse("llama", tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", device_map=device_map)
    torch.testing.assert_close(logits(loaded), logits(dense))


def test_offloaded_to_disk(tmp_path: Path) -> None:
    """accelerate keeps the second layer in files and brings it in for its forward pass."""
    dense = save_sparse("llama", tmp_path / "sparse")
    device_map = {
        "model.embed_tokens": "cpu",
        "lm_head": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    torch.testing.assert_close(logits(loaded), logits(dense))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_layers_of_one_mlp_lie_apart(tmp_path: Path) -> None:
    """accelerate brings each layer's weights and inputs together, so the MLP must call the layers one by one."""
    dense = save_sparse("llama", tmp_path / "sparse")
    names = [name for name, module in dense.named_modules() if name and not list(module.children())]
    device_map = {name: "disk" if "up_proj" in name or "k_proj" in name else "cpu" for name in names}
    loaded: Any = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    mlp: Any = loaded.model.layers[0].mlp
    assert issubclass(type(mlp), FusedMlp) and hasattr(mlp.up_proj, "_hf_hook")
    assert mlp.up_proj.weight.device.type == "meta" and mlp.gate_proj.weight.device.type == "cpu"
    torch.testing.assert_close(logits(loaded), logits(dense))
    loaded.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(dense))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sharded(name: str, tmp_path: Path) -> None:
    dense = save_sparse(name, tmp_path / "sparse", max_shard_size="300KB")
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 3
    torch.testing.assert_close(logits(BY_NAME[name].load(tmp_path / "sparse"), name), logits(dense, name))
    info = reader.open_checkpoint(tmp_path / "sparse")
    assert len(info.files) > 3 and info.layers


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    save_sparse("llama", tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "sparse" / "model.safetensors")


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe", "gpt2", "t5", "clip"])
def test_saving_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    save_sparse(name, tmp_path / "sparse")
    loaded = BY_NAME[name].load(tmp_path / "sparse")
    loaded.save_pretrained(tmp_path / "again")
    first, second = tmp_path / "sparse", tmp_path / "again"
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    quantization = [
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (first, second)
    ]
    assert quantization[0] == quantization[1]


def test_saving_after_a_change_describes_the_change(tmp_path: Path) -> None:
    """Whoever swaps a layer back by hand and saves gets a checkpoint that loads."""
    save_sparse("llama", tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    loaded.model.layers[0].mlp.up_proj = loaded.model.layers[0].mlp.up_proj.to_linear()
    want = logits(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(again), want)


@pytest.mark.parametrize(
    ("name", "saved", "other"),
    [
        ("bert", "BertForMaskedLM", "AutoModel"),
        ("bert", "BertForMaskedLM", "AutoModelForSequenceClassification"),
        ("llama", "LlamaForCausalLM", "AutoModel"),
        ("gpt2", "GPT2LMHeadModel", "AutoModel"),
        ("mixtral", "MixtralForCausalLM", "AutoModel"),
        ("mixtral", "MixtralForCausalLM", "AutoModelForSequenceClassification"),
    ],
)
def test_body_of_another_class(name: str, saved: str, other: str, tmp_path: Path) -> None:
    """A bare encoder, or one with another head, from a checkpoint with a head."""
    dense = save_sparse(name, tmp_path / "sparse")
    dense.save_pretrained(tmp_path / "dense")
    torch.manual_seed(3)
    want = getattr(hf, other).from_pretrained(tmp_path / "dense")
    torch.manual_seed(3)
    got = getattr(hf, other).from_pretrained(tmp_path / "sparse")
    assert sparse_modules(got)
    batch = BY_NAME[name].batch()
    with torch.no_grad():
        torch.testing.assert_close(got(**batch)[0], want(**batch)[0])


def test_one_tower_of_a_composite_model_is_refused(tmp_path: Path) -> None:
    """transformers reads the tower's own part of config.json, which says nothing of our format."""
    save_sparse("clip", tmp_path / "sparse")
    with pytest.raises(RuntimeError, match="mismatch"):
        hf.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "sparse")


def test_head_from_the_checkpoint_of_a_body(tmp_path: Path) -> None:
    model = hf.BertModel(BY_NAME["bert"].config()).eval()
    masks, _ = prune(model, "32x32")
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    loaded = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse")
    assert len(sparse_modules(loaded)) == len(masks)
    batch = BY_NAME["bert"].batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded.bert(**batch)[0], model(**batch)[0])


def test_body_saved_on_its_own(tmp_path: Path) -> None:
    """`model.model.save_pretrained` writes the names that the body's own class has."""
    save_sparse("llama", tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    loaded.model.save_pretrained(tmp_path / "body")
    body = hf.AutoModel.from_pretrained(tmp_path / "body")
    assert len(sparse_modules(body)) == len(sparse_modules(loaded))
    batch = BY_NAME["llama"].batch()
    with torch.no_grad():
        torch.testing.assert_close(body(**batch)[0], loaded.model(**batch)[0])


def test_casting_and_copying_a_loaded_model(tmp_path: Path) -> None:
    save_sparse("llama", tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16)
    half = loaded.half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    widened = half.float()
    assert {m.crow_indices.dtype for m in sparse_modules(widened).values()} == {torch.int32}
    assert torch.isfinite(logits(widened)).all()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_build_needs_no_weights(name: str, tmp_path: Path) -> None:
    save_sparse(name, tmp_path / "sparse")
    (tmp_path / "sparse" / "model.safetensors").unlink()
    model = build(hf.AutoConfig.from_pretrained(tmp_path / "sparse"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    want = BY_NAME[name].build()
    masks, _ = prune(want, BY_NAME[name].block)
    convert(want, masks)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in want.state_dict().items()
    }
    model.load_state_dict(want.state_dict(), assign=True)
    assert {key: mask.blocks_kept for key, mask in masks_of(model).items()} == {
        key: mask.blocks_kept for key, mask in masks.items()
    }


def test_from_config_builds_the_dense_model(tmp_path: Path) -> None:
    """What `AutoModel.from_config` does with our config, which is why `build` exists."""
    save_sparse("llama", tmp_path / "sparse")
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(tmp_path / "sparse"))
    assert not sparse_modules(model)


def test_build_refuses_a_dense_config() -> None:
    with pytest.raises(CheckpointError, match="describes a dense model"):
        build(BY_NAME["llama"].config())


def test_config_is_not_a_way_to_prune(tmp_path: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"sparsify\.prune"):
        hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=BlockSparseConfig(layers={})
        )


@pytest.mark.parametrize("task", ["causal-lm", "sentence-embedding", None])
def test_load_picks_the_class(task: str | None, tmp_path: Path) -> None:
    save_sparse("llama", tmp_path / "sparse")
    loaded = reader.load(tmp_path / "sparse", dtype="bfloat16", task=task)
    assert type(loaded).__name__ == ("LlamaModel" if task == "sentence-embedding" else "LlamaForCausalLM")
    assert loaded.dtype == torch.bfloat16


def test_compiled(tmp_path: Path) -> None:
    dense = save_sparse("llama", tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    batch = BY_NAME["llama"].batch()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, logits(dense))
