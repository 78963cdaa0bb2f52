"""Quality numbers agree with their definitions, whatever the batch size."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sparsify import quality

BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0} | {f"w{number}": number for number in range(1, 40)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_perplexity_is_the_mean_over_tokens(batch):
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(40, (5, 9))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    done = []
    found = quality.perplexity(
        model, Dataset.from_dict({"input_ids": ids.tolist()}), batch=batch, progress=done.append
    )
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert found["tokens"] == 5 * 8
    assert done[-1] == 5
    assert model.training


def test_masked_perplexity_hides_the_same_ordinary_tokens_whatever_the_batch():
    model = BertForMaskedLM(BertConfig(**BERT))
    ids = torch.randint(5, 40, (6, 32))
    special = torch.zeros_like(ids)
    special[:, 0] = special[:, -1] = 1
    data = Dataset.from_dict({"input_ids": ids.tolist(), "special_tokens_mask": special.tolist()})
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    first = quality.masked_perplexity(model, data, 4, batch=2)
    shown = torch.cat(seen)
    hidden = shown == 4
    assert first["tokens"] == int(hidden.sum())
    assert 0.08 < first["tokens"] / (6 * 30) < 0.22
    assert not hidden[special.bool()].any()
    assert torch.equal(shown[~hidden], ids[~hidden])
    seen.clear()
    again = quality.masked_perplexity(model, data, 4, batch=5)
    assert torch.equal(torch.cat(seen), shown)
    assert again["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_a_ruined_model_has_infinite_perplexity_not_an_error():
    assert quality._as_perplexity(1e6, 1)["perplexity"] == math.inf


def test_accuracy_counts_right_answers_through_padding(tokenizer):
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    texts = [torch.randint(1, 40, (length,)).tolist() for length in (3, 9, 5, 7, 1)]
    with torch.no_grad():
        answers = [int(model.eval()(input_ids=torch.tensor([ids])).logits.argmax()) for ids in texts]
    labels = [answers[0], answers[1], (answers[2] + 1) % 3, answers[3], (answers[4] + 1) % 3]
    rows = {"input_ids": texts, "attention_mask": [[1] * len(ids) for ids in texts], "labels": labels}
    found = quality.accuracy(model, Dataset.from_dict(rows), tokenizer, batch=2)
    assert found == {"accuracy": pytest.approx(60.0), "samples": 5}


def test_embeddings_ignore_padding_and_keep_the_order(tokenizer):
    model = BertModel(BertConfig(**BERT)).eval()
    sentences = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9"]
    together = quality.embed(model, sentences, tokenizer, batch=2)
    alone = torch.cat([quality.embed(model, [sentence], tokenizer) for sentence in sentences])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_similarity_ranks_pairs_by_cosine(tokenizer):
    model = BertModel(BertConfig(**BERT)).eval()
    first, second = ["w1 w2", "w3 w4 w5", "w6", "w7 w8"], ["w1 w2", "w9", "w10 w11", "w12"]
    embeddings = quality.embed(model, first + second, tokenizer)
    cosine = (embeddings[:4] * embeddings[4:]).sum(1)
    pairs = Dataset.from_dict({"sentence1": first, "sentence2": second, "score": (cosine * 5).tolist()})
    assert quality.similarity(model, pairs, tokenizer)["spearman"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 1000.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        # By hand: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
        ([1.0, 2.0, 2.0, 3.0], [1.0, 3.0, 2.0, 4.0], 4.5 / math.sqrt(4.5 * 5)),
    ],
    ids=["monotone", "reversed", "ties"],
)
def test_spearman_compares_ranks(first, second, expected):
    assert quality.spearman(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected)
