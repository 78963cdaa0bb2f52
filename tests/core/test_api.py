"""The Python interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.blocks import BlockMask, BlockShape
from sparsify.data.spec import DataSpec
from sparsify.errors import BlockShapeError, ConfigError, PrunerError, TargetError
from sparsify.layers.swap import sparse_modules
from tests.cli import checkpoints


@pytest.fixture
def dense(tmp_path) -> Path:
    return checkpoints.llama(tmp_path / "dense")


def test_the_packages_own_example_runs(dense, tmp_path):
    assert sparsify.__doc__ is not None
    example = sparsify.__doc__.partition("\n\n")[2]
    code = "\n".join(line[4:] for line in example.splitlines() if line.startswith("    "))
    code = code.replace("path/to/model", str(dense)).replace("path/to/sparse", str(tmp_path / "sparse"))
    names: dict = {}
    exec(code.replace('"64x64"', '"32x32"'), names)
    assert len(sparse_modules(names["model"])) == 14
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_prune_returns_what_it_did(dense):
    model = sparsify.load(dense)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = sparsify.prune(
        model, block=(32, 32), sparsity=0.6, scope="layer", targets="re:mlp", convert=False
    )
    assert result.sparsity == pytest.approx(0.6, abs=0.01)
    assert set(result.density) == {
        f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")
    }
    assert not sparse_modules(model)
    for name, mask in result.masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, before[f"{name}.weight"] * mask.elements())
    text = str(result)
    assert "model.layers.0.mlp.up_proj" in text and "128" in text
    assert "6 weights, 60" in text and "not among the targets" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": 48}, BlockShapeError, "48x48 is not supported"),
        ({"block": "3x5"}, BlockShapeError, "3x5"),
        ({"sparsity": 1.0}, ConfigError, "sparsity: must be at least 0 and less than 1"),
        ({"sparsity": -1}, ConfigError, "sparsity: got -1"),
        ({"scope": "everywhere", "sparsity": 3}, ConfigError, "2 faults"),
        ({"floor": 0.9}, ConfigError, "floor 0.9 cannot be kept at sparsity 0.5"),
        ({"method": "magic"}, PrunerError, "unknown pruner 'magic'"),
        ({"norm": "l5"}, PrunerError, "l5"),
        ({"nrom": "l2"}, PrunerError, "has no option 'nrom'"),
        ({"targets": ["attn"]}, TargetError, "matches nothing"),
        ({"block": 256}, TargetError, "smaller than one block"),
    ],
    ids=str,
)
def test_prune_refuses_bad_arguments_and_changes_nothing(dense, arguments, error, message):
    model = sparsify.load(dense)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        sparsify.prune(model, **{"block": 32, **arguments})
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nan_weight_is_named_and_nothing_changes(dense):
    model = sparsify.load(dense)
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = float("nan")
    first = model.get_submodule("model.layers.0.mlp.up_proj").weight.clone()
    with pytest.raises(PrunerError, match=r"model\.layers\.1\.mlp\.down_proj"):
        sparsify.prune(model, block=32)
    assert torch.equal(model.get_submodule("model.layers.0.mlp.up_proj").weight, first)


def test_prune_uses_calibration_batches(dense):
    class Inputs(sparsify.Pruner):
        requires = frozenset({"input_sq"})

        def score(self, layer):
            from sparsify.blocks import to_blocks

            return (
                to_blocks(layer.weight * layer.statistics["input_sq"].sqrt(), layer.block).abs().sum((2, 3))
            )

    globals()["Inputs"] = Inputs
    import sys

    sys.modules["calibrated"] = sys.modules[__name__]
    model = sparsify.load(dense)
    with pytest.raises(ConfigError, match="needs the statistic 'input_sq'"):
        sparsify.prune(model, method="calibrated:Inputs", block=32)
    batches = [{"input_ids": torch.randint(5, 90, (2, 16))} for _ in range(3)]
    result = sparsify.prune(model, method="calibrated:Inputs", block=32, calibration=batches)
    assert result.sparsity == pytest.approx(0.5, abs=0.01) and len(sparse_modules(model)) == 14
    del sys.modules["calibrated"], globals()["Inputs"]


def test_prune_takes_any_module():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    result = sparsify.prune(model, block="16x32", sparsity=0.5)
    assert [type(module).__name__ for module in model] == ["BlockSparseLinear", "ReLU", "BlockSparseLinear"]
    assert set(result.masks) == {"0", "2"}
    assert model(torch.randn(3, 64)).shape == (3, 64)


def test_run_by_name_with_overrides(dense, tmp_path):
    result = sparsify.run(
        "magnitude_oneshot",
        model=str(dense),
        out=tmp_path / "out",
        overrides=["prune.block=32", "stages.0.latency_tokens=[2]", "stages.3.latency_tokens=[2]"],
    )
    assert result.out == tmp_path / "out" and "latency, 2 tokens" in str(result)
    assert len(sparse_modules(sparsify.load(result.out))) == 14


def test_evaluate_and_densify(dense, tmp_path):
    model = sparsify.load(dense)
    sparsify.prune(model, block=32)
    sparse = sparsify.save(model, tmp_path / "sparse")
    data = DataSpec(path=checkpoints.text(tmp_path), length=32, samples=8)
    checkpoints.tokenizer().save_pretrained(sparse)
    report = sparsify.api.evaluate(sparse, data, against=dense, latency_tokens=[4], latency_batches=[1, 2])
    assert list(report["columns"]) == ["dense", "sparse"]
    for column in report["columns"].values():
        assert column["latency"]["4"] > 0 and column["latency_batches"]["2"]["4"] > 0
    with pytest.raises(ConfigError, match="latency batch 0 is out of range: it must be at least 1"):
        sparsify.api.evaluate(sparse, latency_batches=[0])
    plain = sparsify.densify(sparse, tmp_path / "plain")
    report = sparsify.api.evaluate(plain, data, against=dense, latency_tokens=[])
    assert list(report["columns"]) == ["dense", "dense: plain"]


def test_evaluation_says_where_sparse_is_slower():
    from sparsify.stages.evaluate import _slower

    models = {
        "dense": torch.nn.Linear(8, 8),
        "sparse": torch.nn.Sequential(sparsify.BlockSparseLinear(8, 8, 8)),
    }
    dense = {"latency": {"1": 2.0, "256": 5.0}}
    (note,) = _slower(models, {"dense": dense, "sparse": {"latency": {"1": 3.0, "256": 4.0}}})
    assert note.startswith("sparse is slower than dense at 1 token; `sparsify bench`")
    assert not _slower(models, {"dense": dense, "sparse": {"latency": {"1": 1.0, "256": 4.0}}})


def test_saving_tells_how_prune_made_the_model(dense, tmp_path):
    model = sparsify.load(dense)
    sparsify.prune(model, block=32, sparsity=0.4, targets=["re:mlp"], scope="layer")
    sparsify.save(model, tmp_path / "saved")
    recipe = sparsify.Recipe.load(tmp_path / "saved" / "sparsify_recipe.yaml")
    result = sparsify.run(recipe, out=tmp_path / "again")
    assert checkpoints.digests(tmp_path / "saved", "model.safetensors", "config.json") == checkpoints.digests(
        result.out, "model.safetensors", "config.json"
    )
    sparsify.save(sparsify.load(dense), tmp_path / "dense-again")
    assert not (tmp_path / "dense-again" / "sparsify_recipe.yaml").exists()


def test_a_recipe_of_two_prunings_with_calibration_says_what_it_lacks(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    sparsify.prune(model, block=16, targets=["0"], convert=False)
    batches = [{"input": torch.randn(8, 64)} for _ in range(2)]
    sparsify.prune(model, block=32, targets=["2"], method="wanda", calibration=batches)
    sparsify.save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "sparsify_recipe.yaml"
    assert "calibrated with batches given in Python" in file.read_text()
    with pytest.raises(ConfigError, match=r"calibrate needs data\.calibration"):
        sparsify.Recipe.load(file)
    spec = {"path": str(checkpoints.text(tmp_path))}
    stages = sparsify.Recipe.load(file, [], {"data": {"calibration": spec}}).stages
    assert [stage.stage for stage in stages] == ["prune", "calibrate", "prune", "convert"]
    assert [(stages[0].method, str(stages[0].block)), (stages[2].method, str(stages[2].block))] == [
        ("magnitude", "16x16"),
        ("wanda", "32x32"),
    ]


def test_apply_refuses_a_shared_weight_and_changes_nothing(dense):
    model = sparsify.load(dense)
    layers = [layer for layer, _ in sparsify.score(model, block=32, targets=["re:up_proj"])]
    masks = {layer.name: BlockMask.full(layer.shape, layer.block, False) for layer in layers}
    head = BlockMask.full(tuple(model.lm_head.weight.shape), BlockShape(32, 32), False)
    for convert in (True, False):
        message = r"cannot apply the mask of lm_head: it shares its weight with model\.embed_tokens"
        with pytest.raises(ConfigError, match=message):
            sparsify.apply(model, {**masks, "lm_head": head}, convert=convert)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.any()
    assert not sparse_modules(model) and all(layer.weight.any() for layer in layers)
