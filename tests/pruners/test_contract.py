"""Pruners by name, pruners of one's own, and what the contract gives them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import ConfigError, PrunerError
from sparsify.pruner import PrunableLayer, Pruner, available, create_pruner, find_pruner
from sparsify.recipe.schema import Recipe

CUSTOM = '''
from sparsify import Pruner
from sparsify.blocks import to_blocks


class Activity(Pruner):
    """Weights times the size of what they are multiplied with, summed over each block."""

    requires = {"input_sq"}

    def __init__(self, first_layers: float = 1.0):
        self.first_layers = first_layers

    def score(self, layer):
        seen = layer.weight.abs() * layer.statistics["input_sq"].sqrt()
        score = to_blocks(seen, layer.block).mean((2, 3))
        return score * self.first_layers if layer.name.startswith("layers.0.") else score
'''


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "activity.py").write_text(CUSTOM)
    (package / "broken.py").write_text("import nowhere_to_be_found\n")
    (package / "abstract.py").write_text("from sparsify import Pruner\nclass Idle(Pruner): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_package.activity:Activity"


def make_layer(shape: tuple[int, int] = (16, 24), name: str = "layers.0.up") -> PrunableLayer:
    return PrunableLayer(name, name, nn.Parameter(torch.randn(shape)), BlockShape(8, 8))


def test_every_registered_pruner_has_its_modules_name():
    assert {"magnitude", "group_lasso"} <= set(available())
    for name in available():
        pruner = create_pruner(name)
        assert pruner.name == name
        assert type(pruner).__module__ == f"sparsify.pruners.{name}"


def test_a_custom_pruner_is_a_class_of_fifteen_lines_that_sees_weight_name_and_statistics(custom: str):
    body = textwrap.dedent(CUSTOM).partition("class ")[2]
    assert len(body.strip().splitlines()) <= 15
    pruner = create_pruner(custom, first_layers=10.0)
    layer, other = make_layer(), make_layer(name="layers.1.up")
    inputs = torch.randn(50, 24) * torch.arange(24)
    for one in (layer, other):
        one.parameter = layer.parameter
        pruner.calibrate(one, inputs[:20])
        pruner.calibrate(one, inputs[20:])
    score = pruner.score(other)
    assert score.shape == (2, 3) and torch.equal(score[:, 2] > score[:, 0], torch.tensor([True, True]))
    torch.testing.assert_close(pruner.score(layer), 10.0 * score)
    masks = Budget(0.5, floor=0.0).masks(
        {one.name: pruner.score(one) for one in (layer, other)}, [layer, other]
    )
    assert masks["layers.0.up"].density == 1.0 and masks["layers.1.up"].density == 0.0


def test_statistics_are_means_over_all_tokens_of_all_batches():
    class Wants(Pruner):
        requires = frozenset({"input_sq", "hessian"})

        def score(self, layer: PrunableLayer) -> Tensor:
            return torch.zeros(layer.grid)

    layer, inputs = make_layer(), torch.randn(50, 24).double()
    for batch in inputs.split([10, 0, 33, 7]):
        Wants().calibrate(layer, batch)
    assert layer.statistics["tokens"] == 50
    expected = inputs.t() @ inputs / 50
    torch.testing.assert_close(layer.statistics["hessian"].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        layer.statistics["input_sq"].double(), expected.diagonal(), rtol=1e-5, atol=1e-6
    )


def test_optional_hooks_do_nothing_by_default():
    pruner, layer = create_pruner("magnitude"), make_layer()
    before = layer.parameter.detach().clone()
    pruner.calibrate(layer, torch.randn(3, 24))
    pruner.begin([layer], Budget(0.5))
    pruner.before_step([layer], 0.0)
    pruner.after_step([layer], 0.5)
    pruner.update_weights(layer, BlockMask.full(layer.shape, layer.block, False))
    assert torch.equal(layer.parameter, before) and layer.statistics == {}


def test_a_layer_shows_the_gradient_in_the_weights_layout():
    parameter = nn.Parameter(torch.randn(2, 24, 16))
    layer = PrunableLayer("x", "x", parameter, BlockShape(8, 8), index=1, transposed=True)
    assert layer.shape == layer.weight.shape == (16, 24) and layer.grad is None and layer.key == "x"
    parameter.square().sum().backward()
    assert torch.equal(layer.grad, 2 * parameter[1].t())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magnitud", {}, "unknown pruner 'magnitud': did you mean 'magnitude'\\? known are .*group_lasso"),
        ("zzz", {}, "unknown pruner 'zzz': known are .*; name a class of your own as package.module:Class"),
        (
            "magnitude",
            {"nrom": "l1"},
            "'magnitude' has no option 'nrom': did you mean 'norm'\\? known are norm",
        ),
        ("magnitude", {"norm": "l3"}, "norm 'l3' is unknown: choose one of l1, l2, max"),
        ("my_package.nothing:Activity", {}, "cannot import pruner 'my_package.nothing:Activity': No module"),
        ("my_package.broken:Activity", {}, "cannot import .*nowhere_to_be_found"),
        ("my_package.activity:Actvity", {}, "module 'my_package.activity' has no 'Actvity'"),
        ("my_package.activity:to_blocks", {}, "'my_package.activity:to_blocks' is not a pruner"),
        ("my_package.abstract:Idle", {}, "'my_package.abstract:Idle' has no score method"),
        ("my_package.activity:Activity", {"last": 1}, "has no option 'last': known are first_layers"),
        (":Activity", {}, "cannot import pruner ':Activity'"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_wrong_name_or_option_says_what_is_known(custom, method, options, message):
    with pytest.raises(PrunerError, match=message) as caught:
        create_pruner(method, **options)
    assert "\n" not in str(caught.value)


class Mine(find_pruner("magnitude")):
    """Magnitude under another name."""


def test_a_class_is_taken_in_place_of_its_name():
    masks = {}
    for method in (Mine, "magnitude"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 24))
        masks[method] = sparsify.prune(model, method=method, block=8, sparsity=0.5, norm="max").masks
    ours, theirs = masks.values()
    assert all(torch.equal(ours[name].keep, theirs[name].keep) for name in theirs)
    (layer, scores), _ = sparsify.score(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), method=Mine, block=8)
    assert layer.name == "0" and scores.shape == (1, 1)
    recipe = Recipe.from_dict({"version": 1, "stages": [{"stage": "prune", "method": Mine}]})
    assert f"method: {__name__}:Mine" in recipe.to_yaml()


def test_an_object_in_place_of_a_class_says_how_to_give_it():
    with pytest.raises(
        PrunerError, match="got a Mine as pruner: give the class, method=Mine, and its options"
    ):
        create_pruner(Mine())  # pyright: ignore[reportArgumentType]
    with pytest.raises(PrunerError, match="<class 'int'> is not a pruner"):
        create_pruner(int)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", ["group_lasso", "movement", "prune_and_grow"])
def test_what_works_in_training_alone_is_refused_at_once(method: str):
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ConfigError, match=f"{method} prunes while the network trains"):
        sparsify.prune(model, method=method, block=8)


def test_an_option_that_must_be_given_and_a_statistic_nobody_collects(tmp_path, monkeypatch):
    (tmp_path / "strange_pruners.py").write_text(
        "from sparsify import Pruner\n"
        "class Needs(Pruner):\n"
        "    def __init__(self, factor): pass\n"
        "    def score(self, layer): pass\n"
        "class Asks(Needs):\n"
        "    requires = {'colour'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PrunerError, match="needs the option 'factor'"):
        create_pruner("strange_pruners:Needs")
    with pytest.raises(PrunerError, match=r"requires = {'colour'}: it must be a set of hessian, input_sq"):
        create_pruner("strange_pruners:Asks", factor=1)
