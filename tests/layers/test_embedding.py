"""Block-sparse tables: lookup and tied scoring equal the dense table with zeros, through pruning, masks and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import BlockMask, BlockShape, BlockSparseEmbedding, TiedEmbedding
from sparsify.errors import BlockShapeError, CheckpointError, PrunerError, TargetError
from sparsify.masking import mask_gradients, mask_model


def random_mask(shape: tuple[int, int], block: str, seed: int = 0) -> BlockMask:
    """Half of the blocks, with an empty block row where there are several."""
    parsed = BlockShape.parse(block)
    keep = torch.rand(parsed.grid(shape), generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[:1] = True
    keep[1:2] = False
    return BlockMask(keep, shape, parsed)


class Recommender(nn.Module):
    """Scores every item by the mean of the items seen."""

    def __init__(self, items: int = 70, width: int = 24) -> None:
        super().__init__()
        self.items = TiedEmbedding(items, width, padding_idx=0)
        self.mix = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.items(self.mix(self.items(ids).mean(1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        pytest.param((64, 32), "16x16", id="whole"),
        pytest.param((71, 27), "16x8", id="odd"),
        pytest.param((1001, 50), "32x16", id="large"),
        pytest.param((5, 3), "8x8", id="below-one-block"),
    ],
)
def test_rows_are_those_of_the_dense_table(shape: tuple[int, int], block: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, mask = nn.Embedding(*shape, dtype=dtype), random_mask(shape, block)
    sparse = BlockSparseEmbedding.from_embedding(dense, mask)
    table = torch.where(mask.elements(), dense.weight.detach(), 0)
    assert torch.equal(sparse.dense_weight(), table)
    ids = torch.randint(shape[0], (3, 17))
    assert torch.equal(sparse(ids), table[ids])
    assert torch.equal(sparse(ids[0, 0]), table[ids[0, 0]])
    assert sparse(ids[:, :0]).shape == (3, 0, shape[1])
    assert torch.equal(sparse(torch.arange(shape[0], dtype=torch.int32)), table)


def test_gradients_of_both_uses_equal_the_dense_ones() -> None:
    torch.manual_seed(0)
    dense = TiedEmbedding(71, 27, padding_idx=3, dtype=torch.float64)
    mask = random_mask((71, 27), "8x16")
    with torch.no_grad():
        dense.weight.mul_(mask.elements())
    sparse = BlockSparseEmbedding.from_embedding(dense, mask)
    ids, mix = torch.randint(71, (4, 30)), torch.randn(71, 71, dtype=torch.float64)
    ids[0, :5] = 3  # padding, which lookups leave alone and scores do not
    ids[1, :5] = 9  # rows asked for more than once

    def loss(table: nn.Module) -> Tensor:
        return (table(table(ids).tanh()) @ mix).square().mean()

    expected, got = loss(dense), loss(sparse)
    assert torch.allclose(got, expected, rtol=1e-12)
    expected.backward(), got.backward()
    unpacked = BlockSparseEmbedding.from_embedding(dense, mask)
    unpacked.weight.data = sparse.weight.grad
    assert torch.allclose(unpacked.dense_weight(), dense.weight.grad * mask.elements(), rtol=1e-9, atol=1e-15)
    lookup = torch.autograd.grad(sparse(torch.tensor([3, 3])).sum(), sparse.weight)[0]
    assert not lookup.any()


@pytest.mark.parametrize("number", [-1, 70, 71, 80])
def test_numbers_of_no_row_are_errors(number: int) -> None:
    sparse = BlockSparseEmbedding(70, 24, "16x8", random_mask((70, 24), "16x8"))  # padded to 80 rows
    with pytest.raises(IndexError):
        sparse(torch.tensor([1, number]))


def test_a_table_without_blocks_is_zero() -> None:
    mask = BlockMask(torch.zeros(5, 3, dtype=torch.bool), (70, 24), BlockShape(16, 8))
    sparse = BlockSparseEmbedding(70, 24, "16x8", mask)
    assert not sparse(torch.arange(70)).any() and not sparse(torch.ones(2, 24)).any()
    with pytest.raises(IndexError):
        sparse(torch.tensor([70]))


def test_what_does_not_fit_is_told() -> None:
    sparse = BlockSparseEmbedding(70, 24, "16x8")
    with pytest.raises(ValueError, match="vectors of 23 features, expected 24"):
        sparse(torch.ones(2, 23))
    with pytest.raises(BlockShapeError, match="the table is"):
        BlockSparseEmbedding(71, 24, "16x8", random_mask((70, 24), "16x8"))


def test_compiled_lookup_is_the_same() -> None:
    torch.manual_seed(0)
    sparse = BlockSparseEmbedding(70, 24, "16x8", random_mask((70, 24), "16x8"), padding_idx=0)
    ids = torch.randint(70, (4, 6))
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), sparse(ids))
    exported = torch.export.export(sparse, (ids,)).module()
    assert torch.equal(exported(ids), sparse(ids))


def test_masked_training_reaches_both_uses_and_equals_the_packed_table() -> None:
    torch.manual_seed(0)
    model = Recommender()
    result = sparsify.prune(model, block="16x8", sparsity=0.5, targets=["items"], convert=False)
    with torch.no_grad():
        model.items.weight.add_(1)  # what is removed is filled again, under the mask
    mask_model(model, result.masks)
    ids = torch.randint(70, (5, 9))
    masked = model(ids)
    masked.square().mean().backward()
    mask_gradients(model)
    assert not (model.items.weight.grad * ~result.masks["items"].elements()).any()
    packed = Recommender()
    packed.load_state_dict(model.state_dict())
    sparsify.apply(packed, result.masks)
    assert isinstance(packed.items, BlockSparseEmbedding) and packed.items.padding_idx == 0
    assert torch.allclose(packed(ids), masked, atol=1e-5)


def test_checkpoints_keep_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recommender()
    sparsify.prune(model, block="16x8", sparsity=0.6, targets=["Embedding"])
    ids = torch.randint(70, (5, 9))
    sparsify.save(model, tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    assert layers["items"]["kind"] == "embedding" and layers["items"]["shape"] == [70, 24]
    again = sparsify.load(tmp_path / "out", model=Recommender())
    assert torch.equal(again(ids), model.eval()(ids))
    sparsify.densify(tmp_path / "out", tmp_path / "dense", model=Recommender())
    dense = sparsify.load(tmp_path / "dense", model=Recommender())
    assert torch.allclose(dense(ids), model(ids), atol=1e-5)
    with pytest.raises(CheckpointError, match="items"):
        sparsify.load(tmp_path / "out", model=Recommender(items=71))


def test_an_embedding_is_pruned_by_its_own_name_alone() -> None:
    for targets in (None, ["Recommender"], ["re:i"], ["Linear"]):
        result = sparsify.prune(Recommender(), block="8x8", sparsity=0.5, targets=targets, convert=False)
        assert set(result.masks) == {"mix"} and not result.kept_dense
    for targets in (["items", "mix"], ["Embedding", "Linear"], ["TiedEmbedding", "re:mix"]):
        result = sparsify.prune(Recommender(), block="8x8", sparsity=0.5, targets=targets, convert=False)
        assert set(result.masks) == {"items", "mix"}


def test_what_cannot_be_packed_is_told() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    for table, why in (
        (Scaled(70, 24), "Scaled computes something other"),
        (nn.Embedding(70, 24, max_norm=1.0), "max_norm has no"),
        (nn.Embedding(70, 24, sparse=True), "sparse has no"),
    ):
        model = nn.Sequential(table, nn.Linear(24, 24))
        with pytest.raises(TargetError, match=why):
            sparsify.prune(model, block="8x8", targets=["0"])
    tied = nn.Sequential(nn.Embedding(24, 24), nn.Linear(24, 24))
    tied[1].weight = tied[0].weight
    with pytest.raises(TargetError, match="shares its weight"):
        sparsify.prune(tied, block="8x8", targets=["0"])


def test_calibration_sees_what_a_table_scores() -> None:
    torch.manual_seed(0)
    batches = [{"ids": torch.randint(70, (5, 9))} for _ in range(3)]
    settings = {"method": "wanda", "block": "8x8", "sparsity": 0.5, "calibration": batches}
    result = sparsify.prune(Recommender(), targets=["items"], convert=False, **settings)
    assert set(result.masks) == {"items"}

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(70, 24), nn.Linear(24, 24)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    with pytest.raises(PrunerError, match="embedding table only looks rows up"):
        sparsify.prune(Lookup(), targets=["table"], **settings)


def test_a_language_models_own_table_is_packed_by_its_name(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=False, **sizes)).eval()
    result = sparsify.prune(model, block="16x16", sparsity=0.5, targets=["model.embed_tokens", "LlamaMLP"])
    assert {"model.embed_tokens", "model.layers.0.mlp.up_proj"} <= set(result.masks)
    ids = torch.randint(100, (2, 7))
    expected = model(ids).logits
    sparsify.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(again.get_input_embeddings(), BlockSparseEmbedding)
    assert torch.equal(again(ids).logits, expected)
    sparsify.densify(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(dense(ids).logits, expected, atol=1e-5)
