"""Prune and grow: exact masks at every step, exchanges by size and gradient, and a planted support recovered."""

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


class Run:
    """The plain loop of docs/pruners.md, towards a linear map, step by step; notes the masks of every step."""

    def __init__(
        self, model: nn.Module, pruner: Pruner, budget: Budget, optimizer: torch.optim.Optimizer
    ) -> None:
        self.model, self.pruner, self.budget, self.optimizer = model, pruner, budget, optimizer
        self.layers = select(model, BLOCK).layers
        self.masks: list[dict[str, BlockMask]] = []

    def go(self, target: Tensor, steps: int, batches: int = 1) -> dict[str, BlockMask]:
        self.pruner.begin(self.layers, self.budget)
        for step in range(steps):
            if masks := self.pruner.masks(self.layers, step / steps):
                mask_model(self.model, masks)
            self.masks.append(current_masks(self.model))
            for _ in range(batches):
                x = torch.randn(64, target.shape[1])
                (nn.functional.mse_loss(self.model(x), x @ target.t()) / batches).backward()
            self.pruner.before_step(self.layers, step / steps)
            mask_gradients(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.pruner.after_step(self.layers, (step + 1) / steps)
        scores = {layer.name: self.pruner.score(layer) for layer in self.layers}
        masks = self.budget.masks(scores, self.layers)
        mask_model(self.model, masks)
        return masks


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=1e-4),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3),
}


@pytest.mark.parametrize(
    ("optimizer", "ramp", "batches"),
    [
        ("adamw", 0.0, 1),
        ("adamw", 0.5, 3),
        ("sgd", 0.0, 3),
        ("sgd", 0.5, 1),
        ("rmsprop", 0.0, 1),
        ("rmsprop", 0.5, 1),
    ],
)
def test_it_recovers_a_planted_support(optimizer: str, ramp: float, batches: int):
    planted = torch.zeros(128, dtype=torch.bool)
    planted[torch.randperm(128)[:32]] = True
    planted = planted.view(8, 16)
    target = torch.randn(128, 128) * BlockMask(planted, (128, 128), BLOCK).elements()
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    pruner = create_pruner("prune_and_grow", ramp=ramp)
    run = Run(model, pruner, Budget(0.75), OPTIMIZERS[optimizer](model.parameters()))
    masks = run.go(target, 300, batches)
    assert int((masks["0"].keep & planted).sum()) >= 31
    if not ramp:
        assert int((run.masks[0]["0"].keep & planted).sum()) < 16  # chance finds eight of the 32
        assert all(int(mask["0"].keep.sum()) == 32 for mask in run.masks)
    with torch.no_grad():
        x = torch.randn(64, 128)
        wrong, wanted = model(x) - x @ target.t(), x @ target.t()
    assert float(wrong.square().mean()) < 0.3 * float(wanted.square().mean())


@given(
    sparsity=st.floats(0.0, 0.97),
    steps=st.integers(1, 40),
    every=st.sampled_from([0.01, 0.1, 0.3, 1.0]),
    until=st.sampled_from([0.5, 0.75, 1.0]),
    ramp=st.sampled_from([0.0, 0.3, 0.5]),
    scope=st.sampled_from(["global", "layer", "row"]),
)
def test_the_density_is_exact_at_every_step(sparsity, steps, every, until, ramp, scope):
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(36, 72, bias=False), nn.Linear(72, 36, bias=False))
    pruner = create_pruner("prune_and_grow", every=every, until=until, ramp=ramp)
    run = Run(model, pruner, Budget(sparsity, scope), torch.optim.SGD(model.parameters(), lr=0.1))
    final = run.go(torch.randn(36, 36), steps)
    elements = 2 * 36 * 72
    kept = [sum(mask.elements_kept for mask in masks.values()) for masks in [*run.masks, final]]
    removed = [1 - count / elements for count in kept]
    half_a_block = BLOCK.numel / 2 / elements + 1e-9
    exchange = 0.0
    for step, share in enumerate(removed[:-1]):
        p = step / steps
        turns = int(p / every + 1e-6), int((p - 1 / steps) / every + 1e-6)
        if step and turns[0] != turns[1] and turns[1] * every <= until - 1e-6:
            exchange = p
        progress = min(exchange / ramp, 1.0) if ramp else 1.0
        assert abs(share - sparsity * (1 - (1 - progress) ** 3)) <= half_a_block
    assert abs(removed[-1] - sparsity) <= half_a_block


def make_layer() -> PrunableLayer:
    torch.manual_seed(1)
    return PrunableLayer("x", "x", nn.Parameter(torch.rand(64, 64) + 0.1), BLOCK)


def test_an_exchange_drops_the_smallest_and_grows_the_largest_gradients_from_zero():
    layer = make_layer()
    scale = torch.arange(1.0, 33.0).view(4, 8)  # blocks ever larger, row by row: 16 of 32 are kept
    layer.parameter.data.copy_(scale.repeat_interleave(16, 0).repeat_interleave(8, 1))
    pruner = create_pruner("prune_and_grow", fraction=0.5, every=0.1, until=1.0, ramp=0.0)
    pruner.begin([layer], Budget(0.5))
    masks = pruner.masks([layer], 0.0)
    assert masks is not None and torch.equal(masks["x"].keep.flatten(), torch.arange(32) >= 16)
    assert pruner.masks([layer], 0.0) is None

    gradient = torch.zeros(4, 8)
    gradient[0, :7] = torch.arange(7.0, 0.0, -1.0)
    gradient[2, 1] = 9.0  # of a block that is dropped
    gradient[3, 7] = 50.0  # of one that stays
    layer.parameter.grad = gradient.repeat_interleave(16, 0).repeat_interleave(8, 1)
    before = to_blocks(layer.weight, BLOCK).clone()
    for progress in (0.05, 0.1):
        pruner.before_step([layer], progress - 0.05)
        pruner.after_step([layer], progress)
        if progress == 0.05:
            assert pruner.masks([layer], progress) is None  # it is not time yet
    # f(0.1) = 0.5 / 2 * (1 + cos(0.1 pi)) = 0.488: eight of sixteen.
    masks = pruner.masks([layer], 0.1)
    expected = torch.arange(32) >= 24
    expected[[0, 1, 2, 3, 4, 5, 6, 17]] = True
    assert masks is not None and torch.equal(masks["x"].keep.flatten(), expected)
    after = to_blocks(layer.weight, BLOCK)
    assert not after[0, :7].any()  # grown
    assert torch.equal(after[2:], before[2:])  # stayed, was dropped, or was dropped and grew back
    assert not layer.statistics["growth"].any()


def test_the_network_computes_the_same_before_and_after_growing():
    # Adam goes on moving what it once moved, also under the mask.
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    run = Run(
        model,
        create_pruner("prune_and_grow", ramp=0.0, every=0.1),
        Budget(0.5),
        torch.optim.AdamW(model.parameters(), lr=0.01),
    )
    grown_nonzero, layer, after_step = [], run.layers[0], run.pruner.after_step

    def watch(layers, progress):
        before = layer.statistics["keep"].clone()
        after_step(layers, progress)
        new = layer.statistics["keep"] & ~before
        grown_nonzero.append((int(new.sum()), bool(to_blocks(layer.weight, BLOCK)[new].any())))

    run.pruner.after_step = watch  # pyright: ignore[reportAttributeAccessIssue]
    run.go(torch.randn(64, 64), 40)
    assert sum(count for count, _ in grown_nonzero) > 5 and not any(nonzero for _, nonzero in grown_nonzero)


def test_a_phase_taken_up_again_goes_on_as_if_it_had_not_stopped():
    def steps(pruner: Pruner, layer: PrunableLayer, first: int, last: int) -> None:
        for step in range(first, last):
            layer.parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            pruner.before_step([layer], step / 20)
            layer.parameter.data.sub_(0.1 * layer.parameter.grad)
            pruner.after_step([layer], (step + 1) / 20)

    options: dict[str, object] = {"every": 0.15, "until": 0.9, "ramp": 0.5}
    whole, pruner, budget = make_layer(), create_pruner("prune_and_grow", **options), Budget(0.6)
    pruner.begin([whole], budget)
    steps(pruner, whole, 0, 11)
    part = copy.deepcopy(whole)
    steps(pruner, whole, 11, 20)
    again = create_pruner("prune_and_grow", **options)
    again.begin([part], budget, 11 / 20)
    resumed = again.masks([part], 11 / 20)
    assert resumed is not None and resumed["x"].sparsity > 0.5
    steps(again, part, 11, 20)
    assert torch.equal(whole.statistics["keep"], part.statistics["keep"])
    assert torch.equal(whole.weight, part.weight)
    again.begin(
        [part], Budget(0.25), 0.0
    )  # another phase of the same layers starts anew, not from the old mask
    assert "growth" not in part.statistics and part.statistics["keep"].all()


def test_wrong_use_says_what_is_wrong():
    layer = make_layer()
    with pytest.raises(PrunerError, match="no mask of layer x yet: it works during training"):
        create_pruner("prune_and_grow").score(layer)
    with pytest.raises(PrunerError, match=r"call begin\(layers, budget\)"):
        create_pruner("prune_and_grow").after_step([layer], 0.5)
    with pytest.raises(PrunerError, match="layer x has no gradient"):
        create_pruner("prune_and_grow").before_step([layer], 0.5)
    for option, value in (("fraction", 1.5), ("every", 0.0), ("until", 2.0), ("ramp", -1.0)):
        with pytest.raises(PrunerError, match=f"{option} {value} is out of range"):
            create_pruner("prune_and_grow", **{option: value})
    with pytest.raises(PrunerError, match=r"ramp 0.9 is longer than until 0.5"):
        create_pruner("prune_and_grow", ramp=0.9, until=0.5)
