"""Reading, packing and labelling text; every fault in a file has a message that says what to do."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsify.data import spec as data
from sparsify.data.spec import DataSpec
from sparsify.errors import DataError

WORDS = ["[PAD]", "[CLS]", "[SEP]", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]


def make_tokenizer(end: str | None = "<eos>", frame: str | None = None) -> PreTrainedTokenizerFast:
    """One token a letter; `frame` is a template of special tokens such as `[CLS] $A [SEP]`."""
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[PAD]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        special = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def letters(ids: torch.Tensor) -> list[str]:
    return [" ".join(WORDS[token] for token in row) for row in ids.tolist()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_are_packed_with_an_end_token_between_them_and_the_rest_dropped(tmp_path):
    path = write_rows(
        tmp_path / "t.jsonl", [{"text": "a b c"}, {"text": "  "}, {"text": "d e"}, {"text": "f g"}]
    )
    blocks = data.causal_blocks(DataSpec(path=path, length=4), make_tokenizer())
    assert letters(blocks["input_ids"][:]) == ["a b c <eos>", "d e <eos> f"]
    assert torch.equal(blocks["labels"][:], blocks["input_ids"][:])
    assert blocks[0]["input_ids"].dtype == torch.int64


def test_blocks_begin_as_the_tokenizer_begins_a_text(tmp_path):
    (tmp_path / "t.txt").write_text("a b c d e f g")
    spec = DataSpec(path=tmp_path / "t.txt", length=4)
    causal = data.causal_blocks(spec, make_tokenizer(frame="[CLS] $A"))
    assert letters(causal["input_ids"][:]) == ["[CLS] a b c", "[CLS] d e f"]
    masked = data.masked_blocks(spec, make_tokenizer(end=None, frame="[CLS] $A [SEP]"))
    assert letters(masked["input_ids"][:3]) == ["[CLS] a b [SEP]", "[CLS] c d [SEP]", "[CLS] e f [SEP]"]
    assert masked[0]["special_tokens_mask"].tolist() == [1, 0, 0, 1]


def test_long_documents_lose_nothing_at_the_pieces_they_are_read_in(tmp_path, monkeypatch):
    text = "\n\n".join(" ".join("abcdefghij"[i % 10] for i in range(n, n + 7)) for n in range(40))
    (tmp_path / "t.txt").write_text(text)
    spec = DataSpec(path=tmp_path / "t.txt", length=8)
    whole = data.causal_blocks(spec, make_tokenizer())["input_ids"][:]
    monkeypatch.setattr(data, "PIECE", 50)
    assert torch.equal(data.causal_blocks(spec, make_tokenizer())["input_ids"][:], whole)
    assert whole.numel() == 40 * 7  # the end token falls into the dropped rest


def test_samples_takes_the_first_ones(tmp_path):
    (tmp_path / "t.txt").write_text("a b c d e f g")
    blocks = data.causal_blocks(DataSpec(path=tmp_path / "t.txt", length=2, samples=2), make_tokenizer())
    assert letters(blocks["input_ids"][:]) == ["a b", "c d"]


def test_a_folder_is_read_in_the_order_of_its_names_and_other_files_are_left_alone(tmp_path):
    for name, text in (("2.txt", "c d"), ("1.txt", "a b"), ("notes.md", "z z")):
        (tmp_path / name).write_text(text)
    blocks = data.causal_blocks(DataSpec(path=tmp_path, length=3), make_tokenizer())
    assert letters(blocks["input_ids"][:]) == ["a b <eos>", "c d <eos>"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path, kind):
    rows = {"id": ["1", "2"], "body": ["a, b", 'c "d']}
    path = tmp_path / f"t.{kind}"
    match kind:
        case "jsonl":
            write_rows(path, [{"id": "1", "body": "a, b"}, {"id": "2", "body": 'c "d'}])
        case "csv":
            path.write_text('id,body\n1,"a, b"\n2,"c ""d"\n')
        case "tsv":
            path.write_text('id\tbody\n1\ta, b\n2\tc "d\n')
        case "parquet":
            datasets.Dataset.from_dict(rows).to_parquet(path)
    assert data.read_table(DataSpec(path=path)).to_dict() == rows


def test_a_json_string_may_hold_a_unicode_line_separator(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert data.read_table(DataSpec(path=path))["text"][:] == ["a\u2028b"]


def test_the_sts_benchmark_layout_is_recognised_without_a_header(tmp_path):
    path = tmp_path / "sts-dev.csv"
    path.write_text(
        'main-news\tMSR\t2012\t0001\t4.500\tHe said "no.\tHe refused.\n'
        "main-news\tMSR\t2012\t0002\t0.000\tA cat.\tA dog.\tsource\tnote\n"
    )
    expected = {
        "sentence1": ['He said "no.', "A cat."],
        "sentence2": ["He refused.", "A dog."],
        "score": [4.5, 0.0],
    }
    assert data.sentence_pairs(DataSpec(path=path)).to_dict() == expected
    assert data.sentence_pairs(DataSpec(path=path, columns=("5", "6", "4"))).to_dict() == expected
    assert len(data.sentence_pairs(DataSpec(path=path, samples=1))) == 1


def test_pairs_come_from_named_columns(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"x": "a", "y": "b", "z": 1}])
    pairs = data.sentence_pairs(DataSpec(path=path, columns=("x", "y", "z")))
    assert pairs[0] == {"sentence1": "a", "sentence2": "b", "score": 1.0}


def test_labels_are_numbers_or_words_that_the_model_knows(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    assert data.labelled_texts(DataSpec(path=path))["label"][:] == [1, 0]
    path.write_text("text\tlabel\ngood\tpos\nbad\tneg\n")
    assert data.labelled_texts(DataSpec(path=path))["label"][:] == [1, 0]
    assert data.labelled_texts(DataSpec(path=path), {"pos": 0, "neg": 1})["label"][:] == [0, 1]
    with pytest.raises(DataError, match="unknown label 'neg'; the model knows pos"):
        data.labelled_texts(DataSpec(path=path), {"pos": 0})


def test_classification_samples_are_cut_to_length(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"text": "a b c", "label": 2}, {"text": "d", "label": 0}])
    samples = data.classification_samples(DataSpec(path=path, length=2), make_tokenizer())
    assert samples["input_ids"][:] == [[4, 5], [7]]
    assert samples["labels"][:] == [2, 0]


def test_a_named_data_set_is_loaded_with_its_configuration_and_split(monkeypatch):
    asked = {}

    def load_dataset(name, config, split):
        asked.update(name=name, config=config, split=split)
        return datasets.Dataset.from_dict({"text": ["a b", "c d"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DataSpec.parse("owner/set:part", split="test[:5%]", length=3)
    blocks = data.causal_blocks(spec, make_tokenizer())
    assert asked == {"name": "owner/set", "config": "part", "split": "test[:5%]"}
    assert letters(blocks["input_ids"][:]) == ["a b <eos>", "c d <eos>"]


def test_a_data_set_that_cannot_be_loaded_is_one_clear_line():
    with pytest.raises(DataError, match=r"cannot load data set 'nobody/nothing', split 'train': ") as caught:
        data.read_table(DataSpec.parse("nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_content_and_settings_but_not_the_place(tmp_path):
    here, there = tmp_path / "a" / "t.txt", tmp_path / "b" / "t.txt"
    here.parent.mkdir()
    here.write_text("a b c")
    first = data.fingerprint(DataSpec(path=here))
    shutil.copytree(here.parent, there.parent)
    assert data.fingerprint(DataSpec(path=there)) == first
    assert data.fingerprint(DataSpec(path=there, length=7)) != first
    there.write_text("a b d")
    assert data.fingerprint(DataSpec(path=there)) != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "t.txt is empty"),
        ("t.txt", b"a b", "holds less than one block of 512 tokens"),
        ("t.txt", b"caf\xe9 noir", "not UTF-8"),
        ("t.pdf", b"x", "unknown kind; expected one of .txt"),
        ("t.jsonl", b'{"text": "a"}\n{oops\n', "line 2: not JSON"),
        ("t.jsonl", b"[1]\n", "line 1: expected a JSON object, got list"),
        ("t.jsonl", b"\n\n", "no rows"),
        (
            "t.jsonl",
            b'{"x": "a", "y": "b"}\n',
            "found no column of texts; its columns are x, y. Set `columns`",
        ),
        ("t.jsonl", b'{"text": 1}\n', "row 1: expected text, got int"),
        ("t.csv", b"text,x\na\n", "row 2: 1 fields, but the header names 2"),
        ("t.parquet", b"PAR1", "cannot read data file"),
    ],
)
def test_a_faulty_file_is_named_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.causal_blocks(DataSpec(path=tmp_path / name), make_tokenizer())
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("texte",), "has no column texte; its columns are text, label"),
        (("text", "label"), "names 2; expected 1: column of texts"),
    ],
)
def test_a_wrong_column_lists_those_that_are_there(tmp_path, columns, message):
    path = write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": 0}])
    with pytest.raises(DataError, match=message):
        data.causal_blocks(DataSpec(path=path, columns=columns), make_tokenizer())


def test_a_score_that_is_no_number_is_found(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"sentence1": "a", "sentence2": "b", "score": "high"}])
    with pytest.raises(DataError, match="row 1: score 'high' is not a number"):
        data.sentence_pairs(DataSpec(path=path))


def test_files_with_different_columns_are_refused(tmp_path):
    write_rows(tmp_path / "1.jsonl", [{"text": "a"}])
    write_rows(tmp_path / "2.jsonl", [{"body": "a"}])
    with pytest.raises(DataError, match=r"1.jsonl has \['text'\], 2.jsonl has \['body'\]"):
        data.read_table(DataSpec(path=tmp_path))


def test_check_finds_what_is_missing_without_reading(tmp_path):
    with pytest.raises(DataError, match=r"gone.txt does not exist; give a file \(.txt"):
        data.check(DataSpec(path=tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="holds no file of the kinds"):
        data.check(DataSpec(path=tmp_path))
    data.check(DataSpec(name="anything"))


@pytest.mark.parametrize(
    "settings", [{}, {"path": "a", "name": "b"}, {"path": "a", "length": 0}, {"path": "a", "samples": 0}]
)
def test_a_contradictory_spec_is_refused(settings):
    with pytest.raises(DataError):
        DataSpec(**settings)


def test_a_command_line_value_is_a_path_if_it_looks_like_one(tmp_path):
    assert DataSpec.parse("corpus.txt").path is not None
    assert DataSpec.parse(tmp_path).path == tmp_path
    assert DataSpec.parse("imdb").name == "imdb"
