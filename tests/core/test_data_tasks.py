"""Data of tasks other than language models: targets, sentences, pictures, recordings; and text that is streamed."""

from __future__ import annotations

import csv
import json
import shutil
import wave
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from sparsify.data import spec as data
from sparsify.data.media import decode_image, decode_sound, resample
from sparsify.data.spec import DataSpec
from sparsify.errors import ConfigError, DataError
from sparsify.recipe.schema import Recipe
from tests.cli import checkpoints


def rows_of(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sentences_are_lines_cells_or_both_of_a_pair(tmp_path):
    (tmp_path / "t.txt").write_text("one fox\n\n  two foxes \nthree")
    assert data.sentences(DataSpec(path=tmp_path / "t.txt"))["text"][:] == ["one fox", "two foxes", "three"]
    assert data.sentences(DataSpec(path=tmp_path / "t.txt", samples=2))["text"][:] == ["one fox", "two foxes"]
    cells = rows_of(tmp_path / "t.jsonl", [{"text": "a", "id": 1}, {"text": " "}, {"text": "b", "id": 2}])
    assert data.sentences(DataSpec(path=cells))["text"][:] == ["a", "b"]
    pairs = checkpoints.pairs(tmp_path)
    assert data.sentences(DataSpec(path=pairs))["text"][:2] == ["sentence 0", "other 0"]
    named = DataSpec(path=pairs, columns=("sentence1", "sentence2", "score"))
    assert data.sentences(named)["text"][:2] == ["sentence 0", "other 0"]
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"blank.txt holds no sentence: all its texts are empty"):
        data.sentences(DataSpec(path=tmp_path / "blank.txt"))


def test_targets_come_from_columns_and_from_columns_inside_columns(tmp_path):
    rows = [{"translation": {"de": "hund", "en": "dog"}}, {"translation": {"de": "fuchs", "en": "fox"}}]
    path = rows_of(tmp_path / "t.jsonl", rows)
    tokenizer = checkpoints.tokenizer(framed=True)
    for stream in (False, True):
        spec = DataSpec(path=path, columns=("translation.de", "translation.en"), length=5, stream=stream)
        found = (
            [*data.stream_samples(spec, "seq2seq", tokenizer)()]
            if stream
            else data.target_samples(spec, tokenizer)
        )
        assert [tokenizer.decode(row["labels"]) for row in found] == ["<s> d o g </s>", "<s> f o x </s>"]
        assert [len(row["input_ids"]) for row in found] == [5, 5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "label": 0}, {"text": "  ", "label": 1}],
            "row 2: the text is empty; leave the row out",
        ),
        ([{"text": "a", "label": 0}, {"text": None, "label": 1}], "row 2: expected text, got NoneType"),
        (
            [{"text": "a", "label": 0}, {"text": "b", "label": 2}],
            "row 2: label 2 is out of range; .* 2 classes",
        ),
        ([{"text": "a", "label": -1}], "row 1: label -1 is out of range"),
        ([{"text": "a", "label": 0.5}], "row 1: unknown label '0.5'"),
        ([{"text": "a", "label": "x"}], "has 1 labels .x., the model 2 classes without names"),
        ([{"text": "a", "class": 0}], "found no columns of texts and labels; its columns are text, class"),
    ],
    ids=["blank", "none", "high", "negative", "fraction", "words", "column"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_faults_of_labelled_texts_are_told_with_their_row(tmp_path, rows, message, stream):
    spec = DataSpec(path=rows_of(tmp_path / "t.jsonl", rows), stream=stream)
    label2id, tokenizer = {"LABEL_0": 0, "LABEL_1": 1}, checkpoints.tokenizer()
    if stream and "classes without names" in message:
        message = "row 1: unknown label 'x'; the model knows LABEL_0, LABEL_1"
    with pytest.raises(DataError, match=message) as caught:
        if stream:
            list(data.stream_samples(spec, "sequence-classification", tokenizer, label2id)())
        else:
            data.classification_samples(spec, tokenizer, label2id)
    assert "t.jsonl" in str(caught.value)


def test_words_number_classes_without_names(tmp_path):
    path = rows_of(tmp_path / "t.jsonl", [{"text": "a", "label": "sad"}, {"text": "b", "label": "glad"}])
    found = data.labelled_texts(DataSpec(path=path), {"LABEL_0": 0, "LABEL_1": 1})
    assert found["label"][:] == [1, 0]


TASKS = {
    "causal-lm": (checkpoints.text, lambda spec, tok: data.causal_blocks(spec, tok).with_format(None)),
    "masked-lm": (checkpoints.text, lambda spec, tok: data.masked_blocks(spec, tok).with_format(None)),
    "sequence-classification": (checkpoints.labelled, data.classification_samples),
    "seq2seq": (checkpoints.targets, data.target_samples),
    "sentence-embedding": (checkpoints.pairs, lambda spec, tok: data.sentence_pairs(spec)),
    "sentences": (checkpoints.pairs, lambda spec, tok: data.sentences(spec)),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_stream_has_the_rows_of_the_whole(tmp_path, task):
    make, read = TASKS[task]
    path, tokenizer = make(tmp_path), checkpoints.tokenizer(framed=True)
    whole = read(DataSpec(path=path, length=20, samples=18), tokenizer)
    spec = DataSpec(path=path, length=20, samples=18, stream=True)
    begin = data.stream_samples(spec, task, tokenizer)
    assert list(begin()) == list(whole)
    assert list(begin()) == list(whole)  # each call begins again


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_table_can_be_streamed(tmp_path, kind):
    rows = [{"body": f"text {index}", "mark": str(index % 2)} for index in range(300)]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        rows_of(path, rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["body", "mark"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    spec = DataSpec(path=path, columns=("body", "mark"), stream=True)
    found = data.stream_samples(spec, "sequence-classification", checkpoints.tokenizer(), {"a": 0, "b": 1})()
    assert [row["labels"] for row in found] == [index % 2 for index in range(300)]


def test_a_stream_reads_no_further_than_it_is_used(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": "a b"})] * 200
    path.write_text("\n".join([*lines, "{oops"]))
    begin = data.stream_samples(
        DataSpec(path=path, length=4, stream=True), "causal-lm", checkpoints.tokenizer()
    )
    assert len(list(islice(begin(), 5))) == 5
    with pytest.raises(DataError, match="line 201: not JSON"):
        list(begin())


def test_a_named_data_set_is_streamed_by_its_library(monkeypatch):
    asked = {}

    def load_dataset(name, config, split, streaming):
        asked.update(name=name, streaming=streaming)
        return datasets.Dataset.from_dict({"text": ["a b", "c d"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DataSpec(name="owner/set", length=4, stream=True)
    assert len(list(data.stream_samples(spec, "causal-lm", checkpoints.tokenizer())())) == 2
    assert asked == {"name": "owner/set", "streaming": True}


@pytest.mark.parametrize(
    ("sources", "stage", "message"),
    [
        ({"train": {"path": "t.txt", "stream": True}}, {"epochs": 1}, "give `steps`, not `epochs`"),
        (
            {"train": {"path": "t.txt"}, "eval": {"path": "t.txt", "stream": True}},
            {"steps": 1},
            "data.eval.stream: is",
        ),
    ],
    ids=["epochs", "eval"],
)
def test_a_stream_is_for_training_with_a_number_of_steps(sources, stage, message):
    stages = [{"stage": "finetune", **stage}, {"stage": "evaluate"}]
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({"version": 1, "data": sources, "stages": stages})


def test_a_folder_of_pictures_has_its_folders_as_classes(tmp_path):
    folder = checkpoints.pictures(tmp_path)
    (folder / "notes.md").write_text("not a picture")
    found = data.image_samples(DataSpec(path=folder), {"LABEL_0": 0, "LABEL_1": 1})
    assert found["labels"][:4] == [0, 1, 0, 1]  # bright, dark: the front is a fair sample
    assert len(found) == 24
    first = decode_image(found[0]["media"])
    assert (first.mode, first.size) == ("RGB", (30, 21))
    assert data.image_samples(DataSpec(path=folder), {"bright": 1, "dark": 0})["labels"][:2] == [1, 0]
    assert len(data.image_samples(DataSpec(path=folder, samples=5), {"bright": 1, "dark": 0})) == 5


def test_pictures_may_be_listed_in_metadata_a_table_or_a_data_set(tmp_path, monkeypatch):
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("x.png", "y.png"):
        Image.new("L", (4, 4), 200).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,label\ny.png,1\nx.png,0\n")
    listed = data.image_samples(DataSpec(path=folder), {"a": 0, "b": 1})
    assert [Path(row["media"]["path"]).name for row in listed] == ["y.png", "x.png"]
    assert listed["labels"][:] == [1, 0]
    table = rows_of(tmp_path / "t.jsonl", [{"image": "some/x.png", "label": "b"}])
    assert data.image_samples(DataSpec(path=table), {"a": 0, "b": 1})["labels"][:] == [1]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    named = datasets.Dataset.from_dict({"img": [str(folder / "x.png")], "label": [0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: named)
    found = data.image_samples(DataSpec(name="pictures"), {"a": 0, "b": 1})
    assert found["labels"][:] == [1]  # by its name, not its number
    assert decode_image(found[0]["media"]).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: Image.new("L", (4, 4)).save(folder / "stray.png"),
            "stray.png is in no folder of a class",
        ),
        (
            lambda folder: shutil.copytree(folder / "dark", folder / "third"),
            "has 3 labels .bright, dark, third., the model 2",
        ),
        (
            lambda folder: (folder / "metadata.csv").write_text("file_name,label\ngone.png,1\n"),
            "row 1: there is no file .*gone.png",
        ),
    ],
    ids=["stray", "classes", "gone"],
)
def test_faults_of_a_folder_are_told(tmp_path, spoil, message):
    folder = checkpoints.pictures(tmp_path)
    spoil(folder)
    with pytest.raises(DataError, match=message):
        data.image_samples(DataSpec(path=folder), {"LABEL_0": 0, "LABEL_1": 1})


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"cannot read picture .*x.png"):
        decode_image({"bytes": None, "path": str(tmp_path / "x.png")})


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_recordings_of_every_width_are_numbers_from_minus_one_to_one(tmp_path, width, channels):
    values = np.array([0.0, 0.5, -0.5, 0.99])
    scaled = np.round(values * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    frames = b"".join(int(v).to_bytes(width, "little", signed=width > 1) * channels for v in scaled)
    with wave.open(str(tmp_path / "x.wav"), "wb") as stream:
        stream.setparams((channels, width, 8000, 0, "NONE", "NONE"))
        stream.writeframes(frames)
    found = decode_sound({"bytes": None, "path": str(tmp_path / "x.wav")}, 8000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, atol=2.0 ** (1 - 8 * width))
    in_memory = decode_sound({"bytes": (tmp_path / "x.wav").read_bytes(), "path": None}, 8000)
    np.testing.assert_array_equal(in_memory, found)


def test_resampling_keeps_a_tone():
    times = np.arange(800) / 8000
    twice = resample(np.sin(2 * np.pi * 500 * times), 8000, 16000)
    np.testing.assert_allclose(twice, np.sin(2 * np.pi * 500 * np.arange(1600) / 16000), atol=1e-9)
    half = resample(twice, 16000, 8000)
    np.testing.assert_allclose(half, np.sin(2 * np.pi * 500 * times), atol=1e-9)


@pytest.mark.parametrize(
    ("content", "message"), [(b"OggS", "only WAV files with PCM samples are read"), (b"", "it ends early")]
)
def test_what_is_no_recording_is_told(tmp_path, content, message):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(DataError, match=message):
        decode_sound({"bytes": None, "path": str(tmp_path / "x.wav")}, 16000)


def test_the_fingerprint_of_a_folder_follows_its_classes(tmp_path):
    folder = checkpoints.pictures(tmp_path)
    first = data.fingerprint(DataSpec(path=folder))
    shutil.copytree(folder, tmp_path / "copy")
    assert data.fingerprint(DataSpec(path=tmp_path / "copy")) == first
    (folder / "dark").rename(folder / "dim")
    assert data.fingerprint(DataSpec(path=folder)) != first


def test_check_looks_into_folders_of_pictures(tmp_path):
    data.check(DataSpec(path=checkpoints.pictures(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file of the kinds .txt, .*.png, .*.wav"):
        data.check(DataSpec(path=tmp_path / "empty"))
