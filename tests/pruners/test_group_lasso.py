"""Group lasso: the proximal step, and the way to the target that it takes by itself."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify.allocation.budget import Budget, allocate
from sparsify.blocks import BlockShape, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, create_pruner
from sparsify.targets import select

BLOCK = BlockShape(16, 8)


def make_layers(*shapes: tuple[int, int]) -> list[PrunableLayer]:
    return [
        PrunableLayer(f"l{i}", f"l{i}", nn.Parameter(torch.randn(shape)), BLOCK)
        for i, shape in enumerate(shapes)
    ]


def zero_share(layers: list[PrunableLayer]) -> float:
    zero = sum(int((layer.weight == 0).sum()) for layer in layers)
    return zero / sum(layer.weight.numel() for layer in layers)


@given(
    steps=st.integers(1, 40),
    sparsity=st.floats(0.0, 0.98),
    scope=st.sampled_from(["layer", "row", "global", "erdos_renyi"]),
    fade=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_without_a_loss_it_ends_at_the_budget_and_leaves_the_rest_alone(steps, sparsity, scope, fade):
    torch.manual_seed(steps)
    layers = make_layers((40, 36), (64, 20))
    before = [layer.weight.clone() for layer in layers]
    pruner, budget = create_pruner("group_lasso", fade=fade), Budget(sparsity, scope)
    expected = budget.masks({layer.name: pruner.score(layer) for layer in layers}, layers)
    pruner.begin(layers, budget)
    for step in range(steps):
        pruner.after_step(layers, (step + 1) / steps)
    for layer, old in zip(layers, before, strict=True):
        removed = to_blocks(layer.weight, BLOCK).abs().sum((2, 3)) == 0
        differs = removed.sum(1) - (~expected[layer.name].keep).sum(1)
        if scope == "global":
            assert torch.equal(layer.weight, old * expected[layer.name].elements())
        elif scope in ("layer", "erdos_renyi"):
            assert abs(int(differs.sum())) <= 1  # rounding, once edge blocks are among the zeros
        else:
            assert int(differs.abs().max()) <= 1
        assert torch.equal(layer.weight[layer.weight != 0], old[layer.weight != 0])


@pytest.mark.parametrize("floor_ceiling", [(0.3, 1.0), (0.0, 0.6), (0.4, 0.6)], ids=str)
def test_bounds_of_the_budget_hold_on_the_way_and_at_the_end(floor_ceiling):
    layers = make_layers((64, 64), (64, 64))
    with torch.no_grad():
        layers[0].weight.mul_(0.01)
    pruner = create_pruner("group_lasso")
    pruner.begin(layers, Budget(0.5, "global", *floor_ceiling))
    for step in range(20):
        pruner.after_step(layers, (step + 1) / 20)
    assert zero_share(layers) == 0.5
    for layer in layers:
        assert floor_ceiling[0] <= 1 - zero_share([layer]) <= floor_ceiling[1]


def test_a_step_takes_the_same_root_mean_square_off_blocks_of_every_size():
    layer = make_layers((24, 12))[0]  # 16x8, 16x4, 8x8 and 8x4 elements
    pruner = create_pruner("group_lasso", fade=1.0)
    pruner.begin([layer], Budget(0.99))
    old, before = layer.weight.clone(), pruner.score(layer)
    pruner.after_step([layer], 0.1)
    taken = before - pruner.score(layer)
    torch.testing.assert_close(taken, torch.full_like(taken, 0.1 * float(before.max())))
    # The closed form: w_b * max(0, 1 - t_b / ||w_b||) with t_b = t * sqrt(size).
    edge, norm = old[16:, 8:], old[16:, 8:].norm()
    shrunk = edge * (1 - 0.1 * before.max() * edge.numel() ** 0.5 / norm)
    torch.testing.assert_close(layer.weight[16:, 8:], shrunk)


def test_blocks_reach_zero_smallest_first_and_few_at_a_time():
    layer = make_layers((256, 128))[0]
    pruner = create_pruner("group_lasso")
    order = pruner.score(layer).flatten().argsort()
    pruner.begin([layer], Budget(0.75))
    zeros = []
    for step in range(100):
        pruner.after_step([layer], (step + 1) / 100)
        dead = pruner.score(layer).flatten()[order] == 0
        assert not dead[int(dead.sum()) :].any()
        zeros.append(float(dead.float().mean()))
    assert 0.0 < zeros[20] < zeros[40] < zeros[60] < zeros[80] <= zeros[99] == 0.75
    assert max(after - before for before, after in pairwise(zeros)) < 0.06


class Network(nn.Module):
    """A small network with residual blocks, wide enough for odd edge blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(36), nn.Linear(36, 72), nn.GELU(), nn.Linear(72, 36)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def muon(parameters) -> torch.optim.Optimizer:
    """Muon takes matrices alone; the rest stays as it is."""
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=2e-2)


OPTIMIZERS = {
    "muon": muon,
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize(
    ("optimizer", "sparsity"),
    [("muon", 0.5), ("adamw", 0.5), ("adamw", 0.9), ("sgd", 0.9), ("adafactor", 0.5), ("rmsprop", 0.9)],
)
def test_a_plain_training_loop_with_any_optimizer_lands_on_the_target(optimizer: str, sparsity: float):
    teacher, model = Network(), Network()
    layers, budget = select(model, BLOCK).layers, Budget(sparsity)
    step_of = OPTIMIZERS[optimizer](model.parameters())
    pruner = create_pruner("group_lasso")
    pruner.begin(layers, budget)
    total, losses = 200, []
    for step in range(total):
        if step == total - 1:
            scores = {layer.name: pruner.score(layer) for layer in layers}
            masks = allocate(scores, layers, sparsity)
            gone = sum(float(scores[name][~masks[name].keep].square().sum()) for name in scores)
            # Before the last step and the exact cut the penalty alone has arrived.
            assert abs(zero_share(layers) - sparsity) < 0.02
            assert gone < 1e-4 * sum(float(score.square().sum()) for score in scores.values())
        x = torch.randn(32, 36)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        loss.backward()
        step_of.step()
        step_of.zero_grad()
        pruner.after_step(layers, (step + 1) / total)
        losses.append(loss.item())
    assert abs(zero_share(layers) - sparsity) < 0.02
    assert sum(losses[-10:]) < 1.5 * sum(losses[:10])  # it learned under the penalty, or did not fall apart


def test_a_learning_rate_far_above_the_strength_does_not_bring_blocks_back():
    layers = make_layers((64, 64))
    pruner = create_pruner("group_lasso")
    pruner.begin(layers, Budget(0.5))
    for step in range(1000):
        with torch.no_grad():
            layers[0].weight.add_(0.05 * torch.randn(64, 64).sign())  # a block loses about 0.01 a step
        pruner.after_step(layers, (step + 1) / 1000)
        if step == 990:
            assert zero_share(layers) == 0.5
    assert zero_share(layers) == 0.5


def test_blocks_that_the_loss_needs_outgrow_larger_ones_that_it_does_not():
    torch.manual_seed(3)
    # Only the first half of the inputs matters, where the weights start smaller.
    layer, needed = nn.Linear(64, 32, bias=False), torch.zeros(64)
    needed[:32] = 1.0
    with torch.no_grad():
        layer.weight.normal_(std=0.10).mul_(torch.where(needed.bool(), 0.5, 1.0))
    target = torch.randn(32, 64) * needed
    model = nn.ModuleList([layer])
    layers, budget = select(model, BLOCK).layers, Budget(0.5)
    one_shot = budget.masks({"0": create_pruner("magnitude").score(layers[0])}, layers)["0"]
    assert not one_shot.keep[:, :4].any()  # by size alone all of them would go

    optimizer, pruner = torch.optim.Adam(model.parameters(), lr=5e-3), create_pruner("group_lasso")
    pruner.begin(layers, budget)
    for step in range(200):
        x = torch.randn(64, 64)
        nn.functional.mse_loss(layer(x), x @ target.t()).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step(layers, (step + 1) / 200)
    kept = to_blocks(layer.weight, BLOCK).abs().sum((2, 3)) > 0
    assert int(kept[:, :4].sum()) >= 6 and int(kept[:, 4:].sum()) <= 2


def test_a_phase_taken_up_again_goes_on_as_if_it_had_not_stopped():
    whole = make_layers((64, 40))
    pruner, budget = create_pruner("group_lasso"), Budget(0.6)
    pruner.begin(whole, budget)
    for step in range(20):
        pruner.after_step(whole, (step + 1) / 20)
        if step == 9:
            parts = copy.deepcopy(whole)
    again = create_pruner("group_lasso")
    again.begin(parts, budget, progress=10 / 20)
    for step in range(10, 20):
        again.after_step(parts, (step + 1) / 20)
    assert torch.equal(whole[0].weight, parts[0].weight)


def test_wrong_use_says_what_is_wrong():
    layers = make_layers((16, 16))
    with pytest.raises(PrunerError, match=r"call begin\(layers, budget\)"):
        create_pruner("group_lasso").after_step(layers, 0.1)
    for fade in (0.0, 1.1):
        with pytest.raises(PrunerError, match=f"fade {fade} is out of range"):
            create_pruner("group_lasso", fade=fade)
    pruner = create_pruner("group_lasso")
    pruner.begin(layers, Budget(0.5))
    with torch.no_grad():
        layers[0].weight[3, 3] = torch.nan
    with pytest.raises(PrunerError, match="scores of layer l0 hold NaN"):
        pruner.after_step(layers, 0.1)
