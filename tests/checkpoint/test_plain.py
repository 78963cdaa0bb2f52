"""Plain modules: networks that are no Hugging Face checkpoint are pruned, saved, loaded and made dense all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsify
from sparsify.checkpoint.reader import open_checkpoint, read_masks
from sparsify.cli.main import app
from sparsify.errors import CheckpointError, ConfigError, OutputError
from sparsify.layers.swap import sparse_modules


class Autoencoder(nn.Module):
    """Odd sizes, a weight tied to its transpose's neighbour, buffers saved and not."""

    def __init__(self, width: int = 90, code: int = 24) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, code, bias=False))
        self.norm = nn.BatchNorm1d(code)
        self.decoder = nn.ModuleList([nn.Linear(code, 64), nn.Linear(64, width)])
        self.scale = nn.Parameter(torch.ones(width))
        self.tied = nn.Linear(code, 64)
        self.tied.weight = self.decoder[0].weight  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("steps", torch.arange(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        code = self.norm(self.encoder(x))
        return self.decoder[1](torch.relu(self.decoder[0](code) + self.tied(code))) * self.scale


def pruned(**options: Any) -> Autoencoder:
    torch.manual_seed(1)
    model = Autoencoder().eval()
    sparsify.prune(model, block="16x8", sparsity=0.6, targets=["Linear"], **options)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 90)


def test_round_trip_is_exact_and_smaller(tmp_path: Path, x: Tensor) -> None:
    model = pruned()
    assert set(sparse_modules(model)) == {"encoder.0", "encoder.2", "decoder.1"}  # the tied one stays dense
    out = sparsify.save(model, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "sparsify_recipe.yaml",
    }
    loaded = Autoencoder()
    assert sparsify.load(out, model=loaded) is loaded and not loaded.training
    assert torch.equal(loaded(x), model(x))
    assert loaded.tied.weight is loaded.decoder[0].weight
    assert {name: parameter.shape for name, parameter in loaded.named_parameters()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }
    dense = sum(p.nbytes for p in Autoencoder().parameters())
    assert (out / "model.safetensors").stat().st_size < 0.75 * dense


def test_description_is_that_of_any_checkpoint(tmp_path: Path) -> None:
    model = pruned()
    out = sparsify.save(model, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["module_class"].endswith(":Autoencoder")
    assert config["quantization_config"]["quant_method"] == "block_sparse"
    info = open_checkpoint(out)
    assert [layer.name for layer in info.layers] == ["decoder.1", "encoder.0", "encoder.2"]
    masks = sparsify.masks_of(model)
    assert all(torch.equal(mask.keep, masks[name].keep) for name, mask in read_masks(out).items())
    result = CliRunner().invoke(app, ["inspect", str(out)])
    assert result.exit_code == 0 and "encoder.0" in result.output and "90" in result.output


def test_fills_a_model_on_the_meta_device(tmp_path: Path, x: Tensor) -> None:
    model = pruned()
    out = sparsify.save(model, tmp_path / "out")
    with torch.device("meta"):
        empty = Autoencoder()
    with pytest.raises(CheckpointError, match="buffer steps is on the meta device and in no file"):
        sparsify.load(out, model=empty)
    empty.steps = torch.arange(3)
    loaded = sparsify.load(out, model=empty)
    assert torch.equal(loaded(x), model(x)) and loaded.tied.weight is loaded.decoder[0].weight


def test_dtype_and_training_after_loading(tmp_path: Path, x: Tensor) -> None:
    model = pruned()
    model.decoder[1].weight.requires_grad_(False)
    out = sparsify.save(model, tmp_path / "out")
    frozen = Autoencoder()
    frozen.decoder[1].weight.requires_grad_(False)
    loaded = sparsify.load(out, dtype="float64", model=frozen)
    assert loaded.scale.dtype == torch.float64 and loaded.encoder[0].crow_indices.dtype == torch.int32
    assert loaded.norm.num_batches_tracked.dtype == torch.int64
    loaded(x.double()).square().sum().backward()
    assert loaded.encoder[0].weight.grad is not None and loaded.decoder[1].weight.grad is None
    assert torch.allclose(loaded(x.double()), model.double()(x.double()), atol=1e-12)
    again = sparsify.load(sparsify.save(loaded, tmp_path / "again"), model=Autoencoder()).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.state_dict().items())


def test_optimizer_made_before_loading_holds_the_weights(tmp_path: Path) -> None:
    out = sparsify.save(pruned(), tmp_path / "out")
    model = Autoencoder()
    scale = model.scale
    assert sparsify.load(out, model=model).scale is scale


def test_sharded(tmp_path: Path, x: Tensor) -> None:
    from sparsify.checkpoint import writer

    model = pruned()
    out = writer.save(model, tmp_path / "out", max_shard_size=8_000)
    assert len(list(out.glob("*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()
    assert torch.equal(sparsify.load(out, model=Autoencoder())(x), model(x))


def test_dense_module_and_masked_one(tmp_path: Path, x: Tensor) -> None:
    from sparsify.masking import mask_model

    model = Autoencoder().eval()
    result = sparsify.prune(model, block="16x8", sparsity=0.6, convert=False)
    mask_model(model, result.masks)
    out = sparsify.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(sparsify.load(out, model=Autoencoder())(x), model(x))


def test_densify(tmp_path: Path, x: Tensor) -> None:
    model = pruned()
    out = sparsify.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"sparsify\.densify\(path, out, model="):
        sparsify.densify(out, tmp_path / "dense")
    dense = sparsify.densify(out, tmp_path / "dense", model=Autoencoder())
    loaded = sparsify.load(dense, model=Autoencoder())
    assert not sparse_modules(loaded) and isinstance(loaded.encoder[0], nn.Linear)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    kept = sparsify.masks_of(model)["encoder.0"].elements()
    assert torch.equal(loaded.encoder[0].weight != 0, kept)
    with pytest.raises(CheckpointError, match="dense checkpoint already"):
        sparsify.densify(dense, tmp_path / "twice", model=Autoencoder())


class Other(Autoencoder):
    """The same with one layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Other, r"does not fit Other: it has no head\.weight \(and 1 more\)$"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3)),
            "names the block-sparse layer 'encoder.0', which Sequential does not have: build the model that was saved",
        ),
        (
            lambda: Autoencoder(80),
            r"layer 'encoder\.0' does not fit the model: its shape is \[64, 90\] there",
        ),
        (lambda: Autoencoder(code=32), r"layer 'encoder\.2' does not fit the model"),
    ],
    ids=["one-layer-more", "another-model", "another-width", "another-code"],
)
def test_model_that_does_not_fit_is_unchanged(make: Any, message: str, tmp_path: Path) -> None:
    out = sparsify.save(pruned(), tmp_path / "out")
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        sparsify.load(out, model=model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dense_part_that_does_not_fit(tmp_path: Path) -> None:
    class Wider(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7))
            del self.norm

    out = sparsify.save(pruned(), tmp_path / "out")
    faults = (
        r"Wider: the model has no norm\.\w+ \(and 4 more\); scale is \[90\] there and \[7\] in the model$"
    )
    with pytest.raises(CheckpointError, match=faults):
        sparsify.load(out, model=Wider())


def test_damaged_index_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = sparsify.save(pruned(), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["encoder.0.col_indices"][0] = 99
    save_file(tensors, out / "model.safetensors")
    model = Autoencoder()
    with pytest.raises(CheckpointError, match=r"corrupted block indices of encoder\.0"):
        sparsify.load(out, model=model)
    assert isinstance(model.encoder[0], nn.Linear)


def test_folder_of_the_other_sort(tmp_path: Path) -> None:
    out = sparsify.save(pruned(), tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"a plain module, .*:Autoencoder, .*model=Autoencoder\(\.\.\.\)"
    ):
        sparsify.load(out)
    from tests.architectures.zoo import BY_NAME

    BY_NAME["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="is a checkpoint of transformers: load it without `model`"):
        sparsify.load(tmp_path / "gpt2", model=Autoencoder())
    with pytest.raises(ConfigError, match="task 'causal-lm' is for models of transformers"):
        sparsify.load(out, task="causal-lm", model=Autoencoder())


@pytest.mark.parametrize("command", ["prune", "densify", "bench", "eval", "tune"])
def test_command_line_says_where_to_go(command: str, tmp_path: Path) -> None:
    out = sparsify.save(pruned(), tmp_path / "out")
    more = ["--out", str(tmp_path / "new")] if command in ("prune", "densify") else []
    result = CliRunner().invoke(app, [command, str(out), *more])
    message = str(result.exception) if result.stderr == "" else result.stderr
    assert "holds the weights of a plain module" in message and "Autoencoder" in message
    assert result.exit_code != 0 and not (tmp_path / "new").exists()


class WithExtraState(nn.Linear):
    """Keeps something that is no tensor in its state."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(nn.Linear(4, 4)), "a torch.jit module is a program of its own"),
        (lambda: nn.DataParallel(nn.Linear(4, 4)), "it is a wrapper: save the model inside, its `module`"),
        (lambda: torch.compile(nn.Linear(4, 4)), "it is a wrapper: save the model inside, its `_orig_mod`"),
        (lambda: WithExtraState(4, 4), "_extra_state of its state is a dict: safetensors hold tensors alone"),
        (lambda: nn.Linear(4, 4, device="meta"), "is on the meta device: load its weights first"),
    ],
    ids=["jit", "data-parallel", "compiled", "extra-state", "meta"],
)
def test_what_cannot_be_saved(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        sparsify.save(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Autoencoder, "`model` is a model that your own code has built"),
        (pruned(), "has block-sparse layers already"),
    ],
    ids=["class", "sparse"],
)
def test_what_cannot_be_filled(model: Any, message: str, tmp_path: Path) -> None:
    out = sparsify.save(pruned(), tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        sparsify.load(out, model=model)
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        sparsify.load(out, dtype="int8", model=Autoencoder())


def test_output_in_the_way(tmp_path: Path) -> None:
    out = sparsify.save(pruned(), tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists: choose another folder"):
        sparsify.save(Autoencoder(), out)
    assert (out / "model.safetensors").read_bytes() == before
    sparsify.save(Autoencoder(), out, force=True)
    assert not open_checkpoint(out).layers
