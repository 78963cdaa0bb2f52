"""A scope of one's own, a loop of one's own, and what mistakes in a user's own code look like."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsify
from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask, BlockShape
from sparsify.checkpoint.reader import open_checkpoint
from sparsify.cli.main import app
from sparsify.errors import ConfigError, PrunerError
from sparsify.pruner import PrunableLayer
from tests.cli import checkpoints

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

SCOPES = """
import json

def deeper_is_denser(layers, scores, budget):
    depth = [int(layer.name.split("layers.")[1].split(".")[0]) for layer in layers]
    return budget.fit(layers, [1 + d for d in depth])


def by_input(layers, scores, budget):
    return budget.fit(layers, [float(layer.statistics["input_sq"].mean()) + 0.01 for layer in layers])

by_input.requires = {"input_sq"}

def fails(layers, scores, budget):
    return 1 / 0

def deep(layers, scores, budget):
    return json.loads("{")

def arguments(layers, scores):
    return [0.5] * len(layers)

def greedy(layers, scores, budget):
    return [0.5] * len(layers)

greedy.requires = {"hessian"}

def short(layers, scores, budget):
    return [0.5]

NOT_ONE = 3
"""
PRUNERS = """
import torch
from sparsify import Pruner

class Cannot(Pruner):
    def __init__(self, factor=1.0):
        self.factor = 1 / factor
    def score(self, layer):
        return torch.zeros(layer.grid)

class Fails(Pruner):
    def score(self, layer):
        if "layers.1" in layer.name:
            return layer.statistics["nothing"]
        return torch.zeros(layer.grid)

class Forgets(Pruner):
    def score(self, layer):
        layer.weight.abs()

class Looks(Fails):
    def calibrate(self, layer, inputs):
        layer.weight @ inputs
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(autouse=True)
def own(tmp_path_factory, monkeypatch) -> None:
    folder = tmp_path_factory.mktemp("own")
    (folder / "test_my_scopes.py").write_text(SCOPES)
    (folder / "test_my_pruners.py").write_text(PRUNERS)
    monkeypatch.syspath_prepend(folder)


def make_layers(*shapes: tuple[int, int]) -> list[PrunableLayer]:
    return [
        PrunableLayer(f"l{i}", f"l{i}", nn.Parameter(torch.randn(shape)), BlockShape(8, 8))
        for i, shape in enumerate(shapes)
    ]


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 100, (2, 24))} for _ in range(2)]


def mean_density(density: dict[str, float], block: int) -> float:
    return sum(d for name, d in density.items() if f"layers.{block}." in name) / 7


def test_a_scope_of_ones_own_from_python_by_name_and_as_a_function(dense):
    def same(layers, scores, budget):
        assert all(scores[layer.name].shape == layer.grid for layer in layers)
        return budget.fit(layers, [2.0 if "layers.1." in layer.name else 1.0 for layer in layers])

    found = []
    for scope in ("test_my_scopes:deeper_is_denser", same):
        model = AutoModelForCausalLM.from_pretrained(dense)
        result = sparsify.prune(model, block=16, scope=scope)
        assert result.sparsity == pytest.approx(0.5, abs=0.001)
        assert mean_density(result.density, 0) == pytest.approx(1 / 3, abs=0.02)
        assert mean_density(result.density, 1) == pytest.approx(2 / 3, abs=0.02)
        found.append(result.density)
    assert found[0] == found[1]


def test_a_scope_of_ones_own_from_the_command_line_and_in_a_search(dense, tmp_path):
    name, out = "test_my_scopes:deeper_is_denser", tmp_path / "out"
    command = [
        "prune",
        dense,
        "--out",
        out,
        "--block",
        "16",
        "--scope",
        name,
        "--dense-where-slower",
        "never",
    ]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    density = {layer.name: layer.density for layer in open_checkpoint(out).layers}
    assert mean_density(density, 1) == pytest.approx(2 * mean_density(density, 0), abs=0.03)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {dense}\ndata: {{train: {{path: {checkpoints.text(tmp_path)}, length: 32}}}}\n"
        f"stages:\n  - {{stage: finetune, steps: 4, pruner: {{method: group_lasso, block: 16x16, scope: '{name}'}}}}\n"
        "  - {stage: convert, dense_where_slower: never}\n  - {stage: report}\n"
    )
    found = sparsify.run(recipe, out=tmp_path / "searched")
    assert found.report is not None
    trained = {layer["name"]: layer["density"] for layer in found.report["layers"]}
    assert mean_density(trained, 1) == pytest.approx(2 * mean_density(trained, 0), abs=0.03)


def test_a_scope_may_ask_for_statistics(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    with pytest.raises(ConfigError, match="scope 'test_my_scopes:by_input' needs the statistic 'input_sq'"):
        sparsify.prune(model, block=16, scope="test_my_scopes:by_input")
    result = sparsify.prune(model, block=16, scope="test_my_scopes:by_input", calibration=batches())
    assert result.sparsity == pytest.approx(0.5, abs=0.001) and len(set(result.density.values())) > 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.5], "returned 1 densities for 2 layers"),
        (0.5, "returned float: it must return one density for each layer"),
        (None, "returned NoneType"),
        ({"l0": 0.5}, "gives no density to layer l1"),
        ([0.5, float("nan")], "gives layer l1 the density nan: it must be from 0.2 to 0.9"),
        ([0.5, "half"], "gives layer l1 the density nan"),
        ([0.1, 0.9], "gives layer l0 the density 0.1: it must be from 0.2 to 0.9 \\(floor and ceiling\\)"),
        ([0.2, 0.95], "gives layer l1 the density 0.95"),
        ([0.6, 0.6], "keeps 0.6 of the weights, the budget 0.5: return budget.fit"),
    ],
    ids=str,
)
def test_densities_that_cannot_be_used_are_refused_in_one_line(returned, message):
    def strange(layers, scores, budget):
        return returned

    layers = make_layers((64, 64), (64, 64))
    scores = {layer.name: torch.rand(layer.grid) for layer in layers}
    with pytest.raises(ConfigError, match=message) as caught:
        Budget(0.5, strange, floor=0.2, ceiling=0.9).masks(scores, layers)
    assert "\n" not in str(caught.value) and "strange" in str(caught.value)


def test_what_a_scope_returns_is_what_layers_get_whatever_the_container():
    layers = make_layers((64, 64), (32, 64))
    scores = {layer.name: torch.rand(layer.grid) for layer in layers}
    for returned in ([0.375, 0.75], torch.tensor([0.375, 0.75]), {"l1": 0.75, "l0": 0.375}):
        masks = Budget(0.5, lambda *_, given=returned: given).masks(scores, layers)
        assert (masks["l0"].density, masks["l1"].density) == (0.375, 0.75)


@pytest.mark.parametrize(
    ("proportions", "expected"),
    [
        ([1, 3], [0.25, 0.75]),
        ([1, 9], [0.15, 0.85]),  # the floor holds, and what it takes goes from the other
        ([0, 1], [0.15, 0.85]),
    ],
    ids=str,
)
def test_fit_keeps_proportions_as_far_as_bounds_allow(proportions, expected):
    layers = make_layers((64, 64), (64, 64))
    assert Budget(0.5).fit(layers, proportions) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ([0, 0], "no densities in these proportions keep 0.5 of the weights"),
        ([0, 1], "with floor 0.1 and ceiling 0.7 they keep 0.4 at most"),
        ([1, -1], "proportion -1 of layer l1 is out of range"),
        ([1, float("nan")], "proportion nan of layer l1"),
        ([1], "1 proportions for 2 layers"),
    ],
    ids=str,
)
def test_fit_says_why_it_cannot(proportions, message):
    layers = make_layers((64, 64), (64, 64))
    with pytest.raises(ConfigError, match=message):
        Budget(0.5, floor=0.1, ceiling=0.7).fit(layers, proportions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scope", "test_my_scopes:nothing"], "cannot find scope 'test_my_scopes:nothing'"),
        (["--scope", "no_such_scopes:nothing"], "cannot import scope 'no_such_scopes:nothing'"),
        (
            ["--scope", "test_my_scopes:greedy"],
            "has requires = {'hessian'}: a scope can ask for {'input_sq'} alone",
        ),
        (["--scope", "test_my_scopes:NOT_ONE"], "is not a scope: it must be a function"),
        (
            ["--scope", "test_my_scopes:fails"],
            "scope 'test_my_scopes:fails' failed: ZeroDivisionError: division by zero (test_my_scopes.py, line 15)",
        ),
        (
            ["--scope", "test_my_scopes:short"],
            "scope 'test_my_scopes:short' returned 1 densities for 14 layers",
        ),
        (
            ["--method", "test_my_pruners:Cannot", "--option", "factor=0"],
            "pruner 'test_my_pruners:Cannot' cannot be made: ZeroDivisionError: ",
        ),
        (
            ["--method", "test_my_pruners:Fails"],
            "test_my_pruners:Fails' failed in score of layer model.layers.1.self_attn.q_proj: KeyError: 'nothing'",
        ),
        (
            ["--method", "test_my_pruners:Forgets"],
            "pruner 'test_my_pruners:Forgets' returned NoneType as score of layer model.layers.0.self_attn.q_proj",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_mistakes_in_ones_own_code_are_one_line(dense, tmp_path, options, message):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["prune", str(dense), "--out", str(out), "--block", "16", *options])
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())


def test_mistakes_while_calibrating_name_class_hook_and_layer(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    with pytest.raises(
        PrunerError, match=r":Looks' failed in calibrate of layer .*q_proj: RuntimeError: mat"
    ):
        sparsify.prune(model, method="test_my_pruners:Looks", block=16, calibration=batches())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "block_obs"])
def test_a_loop_of_ones_own_sees_the_scores_and_decides(dense, method):
    model = AutoModelForCausalLM.from_pretrained(dense)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {}
    for layer, scores in sparsify.score(model, method=method, block=16, calibration=batches()):
        assert scores.shape == layer.grid and not scores.requires_grad
        keep = (
            scores > scores.median() if "up_proj" in layer.name else torch.ones(layer.grid, dtype=torch.bool)
        )
        masks[layer.name] = BlockMask(keep, layer.shape, layer.block)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    result = sparsify.apply(model, masks)
    found = sparsify.masks_of(model)
    assert len(result.masks) == 14 and result.sparsity > 0.05
    assert all(torch.equal(found[name].keep, mask.keep) for name, mask in masks.items())


def test_the_loops_scores_are_those_that_prune_uses(dense):
    calibration = batches()
    expected = sparsify.prune(
        AutoModelForCausalLM.from_pretrained(dense), method="wanda", block=16, calibration=calibration
    )
    model = AutoModelForCausalLM.from_pretrained(dense)
    scored = sparsify.score(model, method="wanda", block=16, calibration=calibration)
    masks = Budget(0.5).masks({layer.name: s for layer, s in scored}, [layer for layer, _ in scored])
    assert all(torch.equal(mask.keep, expected.masks[name].keep) for name, mask in masks.items())
    assert all(set(layer.statistics) == {"input_sq", "tokens"} for layer, _ in scored)


def test_apply_without_conversion_leaves_zeros_and_refuses_masks_that_do_not_fit(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    name = "model.layers.0.mlp.up_proj"
    mask = BlockMask(torch.arange(7 * 4).view(7, 4) % 2 == 0, (200, 128), BlockShape(32, 32))
    with pytest.raises(ConfigError, match="there are no masks to apply"):
        sparsify.apply(model, {})
    with pytest.raises(ConfigError, match="has no dense weight of this name"):
        sparsify.apply(model, {"model.layers.9.mlp.up_proj": mask})
    with pytest.raises(ConfigError, match=r"its weight is \(128, 200\), the mask is for \(200, 128\)"):
        sparsify.apply(model, {"model.layers.0.mlp.down_proj": mask})
    sparsify.apply(model, {name: mask}, convert=False)
    weight = model.get_submodule(name).weight
    assert not weight[~mask.elements()].any() and weight[mask.elements()].all()


def test_the_readmes_pruner_scope_and_loop_are_short_and_work(dense, tmp_path, monkeypatch):
    pruner, scope, loop = (
        next(code for code in CODE if word in code)
        for word in ("my_pruners.py", "my_scopes.py", "sparsify.score(")
    )
    assert len(pruner.strip().splitlines()) <= 15
    assert len(scope.strip().splitlines()) <= 10
    assert len(loop.strip().splitlines()) <= 10
    (tmp_path / "readme_pruners.py").write_text(pruner)
    (tmp_path / "readme_scopes.py").write_text(scope)
    monkeypatch.syspath_prepend(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(dense)
    names = {"method": "readme_pruners:Activated", "scope": "readme_scopes:deeper_is_denser"}
    result = sparsify.prune(model, block=16, calibration=batches(), **names)
    assert result.sparsity == pytest.approx(0.5, abs=0.001)
    assert mean_density(result.density, 1) > mean_density(result.density, 0) + 0.1
    model = AutoModelForCausalLM.from_pretrained(dense)
    exec(loop, {"model": model})
    assert len(sparsify.masks_of(model)) == 14
