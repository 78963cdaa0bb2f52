"""Movement pruning: what the scores are, the masks on the way, and the blocks that magnitude gets wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask, BlockShape, to_blocks
from sparsify.errors import PrunerError
from sparsify.masking import current_masks, mask_gradients, mask_model
from sparsify.pruner import PrunableLayer, Pruner, create_pruner
from sparsify.targets import select

BLOCK = BlockShape(16, 8)


def train(
    model: nn.Module,
    target: Tensor,
    pruner: Pruner,
    budget: Budget,
    steps: int,
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, BlockMask], list[float]]:
    """The plain loop of docs/pruners.md, towards a linear map; the exact masks, and the density at every step."""
    layers, densities = select(model, BLOCK).layers, []
    elements = sum(layer.weight.numel() for layer in layers)
    pruner.begin(layers, budget)
    for step in range(steps):
        if masks := pruner.masks(layers, step / steps):
            mask_model(model, masks)
        kept = sum(mask.elements_kept for mask in current_masks(model).values()) or elements
        densities.append(kept / elements)
        x = torch.randn(64, target.shape[1])
        nn.functional.mse_loss(model(x), x @ target.t()).backward()
        pruner.before_step(layers, step / steps)
        mask_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step(layers, (step + 1) / steps)
    masks = budget.masks({layer.name: pruner.score(layer) for layer in layers}, layers)
    mask_model(model, masks)
    return masks, densities


def misleading() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A layer, its target, and the blocks that matter: half of them, where the weights start five times smaller."""
    needed = torch.arange(8).repeat(4, 1) % 2 == 0
    needed[1::2] = ~needed[1::2]
    elements = BlockMask(needed, (64, 64), BLOCK).elements()
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.normal_(std=0.2).mul_(torch.where(elements, 0.2, 1.0))
    # Fine-tuning starts near the optimum where it matters, and has no use for the rest.
    return nn.Sequential(layer), torch.randn(64, 64) * elements * 0.3, needed


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["global", "row"])
def test_it_finds_the_planted_blocks_that_magnitude_misses(optimizer: str, scope: str):
    model, target, needed = misleading()
    budget = Budget(0.5, scope)
    layers = select(model, BLOCK, ["0"]).layers
    by_size = budget.masks({"0": create_pruner("magnitude").score(layers[0])}, layers)["0"].keep
    assert float((by_size & needed).sum()) <= 0.1 * float(needed.sum())
    found = {}
    for method in ("magnitude", "movement"):
        trained = copy.deepcopy(model)
        step_of = OPTIMIZERS[optimizer](trained.parameters())
        masks, _ = train(trained, target, create_pruner(method), budget, 30, step_of)
        found[method] = float((masks["0"].keep & needed).sum() / needed.sum())
    # So short a training does not bring the large weights below the small ones.
    assert found["magnitude"] <= 0.25 and found["movement"] >= 0.9


def test_the_score_is_minus_weight_times_gradient_meant_over_each_blocks_own_elements():
    layer = PrunableLayer("x", "x", nn.Parameter(torch.randn(40, 20)), BLOCK)
    pruner, expected = create_pruner("movement"), torch.zeros(3, 3)
    pruner.begin([layer], Budget(0.5))
    for _ in range(3):
        layer.parameter.grad = torch.randn(40, 20)
        pruner.before_step([layer], 0.1)
        moved = -layer.weight * layer.grad
        for r in range(3):
            for c in range(3):
                expected[r, c] += moved[16 * r : 16 * r + 16, 8 * c : 8 * c + 8].mean()
    torch.testing.assert_close(pruner.score(layer), expected)
    layer.parameter.grad[0, 0] = torch.inf
    pruner.before_step([layer], 0.1)
    torch.testing.assert_close(pruner.score(layer), expected)


@given(
    sparsity=st.floats(0.0, 0.97),
    steps=st.integers(1, 30),
    shares=st.tuples(st.floats(0.0, 0.5), st.floats(0.0, 0.5)),
    scope=st.sampled_from(["global", "layer", "row"]),
)
def test_the_density_follows_the_ramp_exactly_at_every_step(sparsity, steps, shares, scope):
    torch.manual_seed(steps)
    warmup, settle = shares
    model = nn.Sequential(nn.Linear(36, 72, bias=False), nn.Linear(72, 36, bias=False))
    pruner, budget = create_pruner("movement", warmup=warmup, settle=settle), Budget(sparsity, scope)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks, densities = train(model, torch.randn(36, 36), pruner, budget, steps, optimizer)
    half_a_block = BLOCK.numel / 2 / (2 * 36 * 72) + 1e-9
    for step, density in enumerate(densities):
        p = step / steps
        rising = 1 - warmup - settle
        share = 0.0 if p <= warmup else min((p - warmup) / rising, 1.0) if rising > 0 else 1.0
        assert abs(1 - density - sparsity * (1 - (1 - share) ** 3)) <= half_a_block
    kept = sum(mask.elements_kept for mask in masks.values()) / (2 * 36 * 72)
    assert abs(1 - kept - sparsity) <= half_a_block


def test_a_masked_block_keeps_its_weights_and_comes_back_with_them():
    layer = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(layer)
    layers, pruner = select(model, BlockShape(8, 8), ["0"]).layers, create_pruner("movement", warmup=0.0)
    old = layer.weight.detach().clone()
    pruner.begin(layers, Budget(0.5, "layer"))
    towards, away = (sign * torch.sign(old) for sign in (1.0, -1.0))
    for gradient in (towards, away):  # of the upper half; the lower half gets the opposite
        layer.weight.grad = torch.cat([gradient[:8], -gradient[8:]]) * (1.0 if gradient is towards else 3.0)
        pruner.before_step(layers, 0.8)
        masks = pruner.masks(layers, 0.8)
        assert masks is not None
        mask_model(model, masks)
        upper_half = masks["0"].keep[0]
        assert bool(upper_half.all()) == (gradient is away) and pruner.masks(layers, 0.9) is None
    effective = to_blocks(model.state_dict()["0.weight"], BlockShape(8, 8))
    assert torch.equal(effective[0], to_blocks(old, BlockShape(8, 8))[0])


def test_wrong_use_says_what_is_wrong():
    layer = PrunableLayer("x", "x", nn.Parameter(torch.randn(16, 16)), BLOCK)
    with pytest.raises(
        PrunerError, match="movement has seen no gradient of layer x: it works during training"
    ):
        create_pruner("movement").score(layer)
    with pytest.raises(PrunerError, match="layer x has no gradient"):
        create_pruner("movement").before_step([layer], 0.0)
    with pytest.raises(PrunerError, match=r"call begin\(layers, budget\)"):
        create_pruner("movement").masks([layer], 0.5)
    with pytest.raises(PrunerError, match=r"warmup -0.1 is out of range"):
        create_pruner("movement", warmup=-0.1)
    with pytest.raises(PrunerError, match=r"warmup 0.6 and settle 0.5 are more than the phase"):
        create_pruner("movement", warmup=0.6, settle=0.5)
