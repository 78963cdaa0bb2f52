"""Free symmetries leave the function as it is, in every architecture; the order found keeps more in fewer blocks."""

import pytest
import torch

import sparsify
from sparsify.blocks import BlockShape
from sparsify.permutation import best_order, permute
from sparsify.symmetries import Axis, Symmetry, symmetries
from tests.architectures.zoo import ARCHITECTURES

HEADS, HIDDEN, EXPERT = "value head", "feed-forward", "expert"
# What is known of each architecture; Phi-3 keeps gate and up, and query, key and value, in one weight each.
KNOWN = {
    "llama": {HEADS, HIDDEN}, "qwen3": {HEADS, HIDDEN}, "mistral": {HEADS, HIDDEN}, "gemma": {HEADS, HIDDEN},
    "phi3": set(), "gpt2": {HIDDEN}, "gpt-neox": {HIDDEN}, "opt": {HEADS}, "bert": {HEADS, HIDDEN},
    "roberta": {HEADS, HIDDEN}, "distilbert": {HEADS, HIDDEN}, "t5": {HEADS, HIDDEN}, "vit": {HEADS, HIDDEN},
    "whisper": {HEADS}, "clip": {HEADS, HIDDEN}, "mixtral": {HEADS, EXPERT}, "qwen3-moe": {HEADS, HIDDEN, EXPERT},
    # No symmetry of convolutions is known.
    "resnet": set(), "resnet-bottleneck": set(), "convnext": set(), "mobilenet-v2": set(), "regnet": set(),
}  # fmt: skip


def kind(symmetry: Symmetry) -> str:
    return next((name for name in (HEADS, EXPERT) if f", {name} " in symmetry.name), HIDDEN)


def output(model, batch):
    with torch.no_grad():
        result = model(**batch)
    return result.logits_per_text if hasattr(result, "logits_per_text") else result.logits


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_permuted_model_computes_the_same(architecture):
    model = architecture.build()
    model.config._experts_implementation = "eager"  # the fused product of experts knows no float64
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # so that every part shows in the output
    batch = {k: v.double() if v.is_floating_point() else v for k, v in architecture.batch().items()}
    before, found = output(model, batch), symmetries(model)
    assert {kind(symmetry) for symmetry in found} == KNOWN[architecture.name]
    for symmetry in found:
        symmetry.apply(torch.randperm(symmetry.units))
    assert (output(model, batch) - before).abs().max() < 1e-9 * before.abs().max()
    if found:  # one weight alone is no symmetry
        axis = found[-1].axes[-1]
        lonely = Symmetry("one weight", found[-1].units, (axis,))
        lonely.apply(torch.arange(lonely.units).roll(1))
        assert (output(model, batch) - before).abs().max() > 1e-3 * before.abs().max()


def test_grouped_queries_share_the_order_of_their_value_head():
    architecture = next(a for a in ARCHITECTURES if a.name == "llama")  # six query heads, two value heads
    heads = [s for s in symmetries(architecture.build()) if kind(s) == HEADS and "layers.0" in s.name]
    assert [len(head.axes) for head in heads] == [4, 4]  # the values' rows, three heads' columns
    columns = torch.cat([axis.positions for head in heads for axis in head.axes if axis.dim == 1])
    assert torch.equal(columns.sort().values, torch.arange(192))


def planted() -> Symmetry:
    """Strong units scattered among weak ones: every block of rows has some of both."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator) * 0.01
    weight[::2] += torch.randn(32, 32, generator=generator)
    out = torch.randn(16, 64, generator=generator)
    places = torch.arange(64)
    return Symmetry("planted", 64, (Axis("up", weight, 0, places), Axis("down", out, 1, places)))


def test_strong_units_come_together():
    symmetry = planted()
    order, before, after = best_order(symmetry, BlockShape(8, 8), 0.5)
    assert after > before + 0.05
    symmetry.apply(order)
    strong = symmetry.axes[0].tensor.square().sum(1) > 1
    in_blocks = strong.view(8, 8).sum(1).sort(descending=True).values
    assert in_blocks[:4].sum() >= 31  # of 32, which fill four blocks


def test_the_share_kept_is_that_of_the_blocks():
    symmetry = planted()
    order, before, after = best_order(symmetry, BlockShape(8, 8), 0.5)
    for share, own in ((before, torch.arange(64)), (after, order)):
        up = symmetry.axes[0].tensor[own].square().view(8, 8, 4, 8).sum((1, 3)).flatten()
        down = symmetry.axes[1].tensor[:, own].square().view(2, 8, 8, 8).sum((1, 3)).flatten()
        every = torch.cat([up, down])
        assert share == pytest.approx(float(every.topk(len(every) // 2).values.sum() / every.sum()), rel=1e-4)


def test_an_order_that_gains_nothing_is_not_taken():
    weight, places = torch.ones(16, 8), torch.arange(16)
    symmetry = Symmetry("even", 16, (Axis("up", weight, 0, places),))
    order, before, after = best_order(symmetry, BlockShape(8, 8), 0.5)
    assert torch.equal(order, places) and before == after


def test_no_permutation_is_refused():
    with pytest.raises(ValueError, match="expected a permutation of 64 units"):
        planted().apply(torch.zeros(64, dtype=torch.int64))


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_permute_keeps_more_and_changes_nothing(name):
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, batch = architecture.build(), architecture.batch()
    before = output(model, batch)
    gained = sparsify.permute(model, "8x8", 0.5)
    assert torch.allclose(output(model, batch), before, atol=1e-5 * float(before.abs().max()))
    assert all(own.after >= own.before for own in gained)
    assert max(own.after - own.before for own in gained) > 0.005


def test_sparse_layers_have_no_free_symmetry():
    architecture = next(a for a in ARCHITECTURES if a.name == "llama")
    model = architecture.build()
    sparsify.prune(model, block="32x32", sparsity=0.5)
    assert not symmetries(model) and permute(model, "32x32", 0.5) == []
