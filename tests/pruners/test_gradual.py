"""The cubic ramp: any pruner prunes step by step, on dense weights, and what is masked may come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockShape
from sparsify.errors import ConfigError, PrunerError
from sparsify.masking import current_masks, removed_share
from sparsify.pruner import PrunableLayer, Pruner, create_pruner
from sparsify.recipe.schema import Recipe
from sparsify.targets import select
from sparsify.training.pruning_loop import PruningLoop

BLOCK = BlockShape(8, 8)


class Told(Pruner):
    """Scores that a test sets."""

    def __init__(self) -> None:
        self.scores: dict[str, Tensor] = {}

    def score(self, layer: PrunableLayer) -> Tensor:
        return self.scores[layer.name]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 24))


def run(loop: PruningLoop, model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> list[float]:
    """Trains to the end; returns the share removed after each step."""
    shares = []
    inputs = torch.randn(steps, 16, 48, generator=torch.Generator().manual_seed(1))
    while loop.step < steps:
        model(inputs[loop.step]).square().mean().backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
        optimizer.zero_grad()
        shares.append(removed_share(model, loop.layers))
    return shares


def test_sparsity_rises_by_the_cubic_ramp_at_every_update():
    model = make_model()
    layers = select(model, BLOCK).layers
    loop = PruningLoop(create_pruner("magnitude"), layers, Budget(0.75), until=0.8, start=0.2, every=4)
    loop.begin(model, 50)
    shares = run(loop, model, 50, torch.optim.SGD(model.parameters(), lr=0.1))
    elements = sum(layer.weight.numel() for layer in layers)
    for step, share in enumerate(shares, 1):
        done = min((step - 10) // 4 * 4 / 30, 1.0) if step < 40 else 1.0
        expected = 0.75 * (1 - (1 - done) ** 3) if step > 10 else 0.0
        assert abs(share - expected) <= BLOCK.numel / 2 / elements, step


def test_a_masked_block_keeps_its_weights_and_comes_back_when_its_score_does():
    model, pruner = make_model(), Told()
    (layer,) = select(model, BLOCK, ["0"]).layers
    loop = PruningLoop(pruner, [layer], Budget(0.5), every=1)
    ranked = torch.arange(48.0).view(8, 6)
    pruner.scores = {"0": ranked}
    loop.begin(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(16, 48)
    for step in range(4):
        model(inputs).square().mean().backward()
        assert layer.grad is not None
        shown = layer.grad.clone()
        loop.before_step()
        optimizer.step()
        if step == 2:
            pruner.scores = {"0": -ranked}  # the last shall be first
        loop.after_step()
        optimizer.zero_grad()
        if step == 0:
            first, before = current_masks(model)["0"], layer.weight.clone()
            assert not first.keep[0, 0] and first.keep[-1, -1]
        if step == 1:
            hidden = ~first.elements()
            assert shown[hidden].any(), "the gradient of the effective weight reaches masked blocks"
            assert torch.equal(layer.weight[hidden], before[hidden])
        if step == 2:
            assert current_masks(model)["0"].keep[0, 0] and torch.equal(layer.weight[:8, :8], before[:8, :8])
    assert loop.masks is not None
    assert bool(loop.masks["0"].keep[0, 0]) and not loop.masks["0"].keep[-1, -1]


@pytest.mark.parametrize("method", ["magnitude", "random_blocks"])
def test_a_pruner_without_a_schedule_of_its_own_gets_the_ramp(method: str):
    assert PruningLoop(create_pruner(method), [], Budget(0.5)).cubic
    assert not PruningLoop(create_pruner(method), [], Budget(0.5), schedule="once").cubic


@pytest.mark.parametrize("method", ["group_lasso", "movement", "prune_and_grow"])
def test_a_pruner_with_a_schedule_of_its_own_keeps_it(method: str):
    assert not PruningLoop(create_pruner(method), [], Budget(0.5)).cubic
    with pytest.raises(PrunerError, match=f"'{method}' prunes by a schedule of its own"):
        PruningLoop(create_pruner(method), [], Budget(0.5), schedule="cubic")


def test_at_once_means_nothing_is_masked_before_the_end_of_the_phase():
    model = make_model()
    layers = select(model, BLOCK).layers
    loop = PruningLoop(create_pruner("magnitude"), layers, Budget(0.5), until=0.5, schedule="once")
    loop.begin(model, 8)
    shares = run(loop, model, 8, torch.optim.SGD(model.parameters(), lr=0.1))
    assert shares == [0.0] * 3 + [0.5] * 5


def test_updates_farther_apart_than_the_phase_is_long_are_refused():
    model = make_model()
    loop = PruningLoop(
        create_pruner("magnitude"), select(model, BLOCK).layers, Budget(0.5), until=0.5, every=5
    )
    with pytest.raises(ConfigError, match="every 5 is no shorter than the pruning phase of 5 steps"):
        loop.begin(model, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cubik"}, "got 'cubik', expected auto, cubic or once"),
        ({"every": 0}, "every: got 0"),
        ({"method": "movement", "every": 5}, "every 5 is for the cubic schedule"),
        ({"method": "group_lasso", "schedule": "once"}, "prunes by a schedule of its own"),
    ],
    ids=["unknown", "no steps", "every without cubic", "own schedule"],
)
def test_a_recipe_with_a_wrong_schedule_is_refused(settings: dict, message: str, tmp_path: Path):
    stage = {"stage": "finetune", "steps": 10, "pruner": {"block": "32x32", **settings}}
    data = {"train": {"path": str(tmp_path / "text.txt")}}
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({"version": 1, "data": data, "stages": [stage]})
