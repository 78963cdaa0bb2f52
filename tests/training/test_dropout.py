"""Dropout while training, by the recipe's word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import BartConfig, BartModel, BertConfig, BertModel

from sparsify.recipe.schema import FinetuneStage
from sparsify.training.dropout import dropout_of
from sparsify.training.finetune import train
from sparsify.training.samples import Samples

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def _bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=32, **SIZES)).train()


def _outputs(model: nn.Module) -> list[torch.Tensor]:
    tokens = torch.arange(8)[None]
    return [model(tokens).last_hidden_state for _ in range(2)]


def test_without_dropout_a_model_in_training_repeats_itself() -> None:
    model = _bert()
    with dropout_of(model, 0.0):
        assert model.training
        first, second = _outputs(model)
        assert torch.equal(first, second)
    first, second = _outputs(model)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_probability_is_set_and_comes_back(share: float) -> None:
    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.2, attention_dropout=0.3,
        activation_dropout=0.4, encoder_layerdrop=0.1,
    )  # fmt: skip
    model = BartModel(config)
    layer = model.encoder.layers[0]

    def told() -> list[float]:
        return [layer.dropout, layer.self_attn.dropout, layer.activation_dropout, model.encoder.layerdrop]

    with dropout_of(model, share):
        assert told() == [share] * 3 + [0.1]
    assert told() == [0.2, 0.3, 0.4, 0.1]


def test_an_error_in_the_training_gives_them_back_too() -> None:
    model = _bert()
    with pytest.raises(RuntimeError), dropout_of(model, 0.0):
        raise RuntimeError
    first, second = _outputs(model)
    assert not torch.equal(first, second)


def test_none_changes_nothing() -> None:
    model = _bert()
    with dropout_of(model, None):
        first, second = _outputs(model)
    assert not torch.equal(first, second)


def test_a_finetune_stage_trains_without_dropout_if_it_says_so(tmp_path: Path) -> None:
    model, seen = _bert(), []

    def loss(student: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(module.p for module in student.modules() if isinstance(module, nn.Dropout))
        return student(batch["input_ids"]).last_hidden_state.square().mean()

    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]
    samples = Samples(rows, default_collate, loss)
    stage = FinetuneStage.model_validate({"stage": "finetune", "steps": 2, "batch": 2, "dropout": 0})
    train(model, samples, stage, tmp_path)
    assert seen and set(seen) == {0}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}
