"""The translation task that comes with the recipe for it: the words, the files, the model, and pruning that model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import toy_translation
from sparsify.checkpoint import reader
from sparsify.cli.main import app
from sparsify.layers.swap import sparse_modules

NUMBERS = {
    0: ("zero", "null"),
    1: ("one", "eins"),
    17: ("seventeen", "siebzehn"),
    21: ("twenty-one", "einundzwanzig"),
    101: ("one hundred one", "einhunderteins"),
    101_000: ("one hundred one thousand", "einhunderteintausend"),
    42_007: ("forty-two thousand seven", "zweiundvierzigtausendsieben"),
    999_130: (
        "nine hundred ninety-nine thousand one hundred thirty",
        "neunhundertneunundneunzigtausendeinhundertdreißig",
    ),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_in_words(number: int) -> None:
    assert (toy_translation.english(number), toy_translation.german(number)) == NUMBERS[number]


def test_no_two_numbers_have_the_same_words() -> None:
    numbers = [*range(2000), *range(2000, toy_translation.LIMIT, 97)]
    for words in (toy_translation.english, toy_translation.german):
        assert len({words(number) for number in numbers}) == len(numbers)
    with pytest.raises(ValueError, match="got 1000000, expected a number from 0 to 999,999"):
        toy_translation.german(1_000_000)


def test_data_are_the_same_each_time_and_no_number_is_in_both_files(tmp_path: Path) -> None:
    files = toy_translation.write_data(tmp_path / "one", 300, 40)
    again = toy_translation.write_data(tmp_path / "two", 300, 40)
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    assert texts == {name: file.read_text(encoding="utf-8") for name, file in again.items()}
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}
    assert [len(part) for part in rows.values()] == [300, 40]
    sources = [{row["source"] for row in part} for part in rows.values()]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 340
    assert {"zero", "ninety-nine"} <= sources[0]  # each word occurs

    toy_translation.write_skeleton(tmp_path / "skeleton", files["train"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "skeleton")
    for row in rows["held_out"]:
        for text in row.values():
            tokens = tokenizer(text).input_ids
            assert tokens[-1] == tokenizer.eos_token_id and len(tokens) <= toy_translation.LENGTH
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_command_trains_a_model_that_the_recipe_prunes(tmp_path: Path, capsys) -> None:
    options = ["--out", str(tmp_path), "--train", "128", "--held-out", "16", "--width", "64", "--layers", "1"]
    assert toy_translation.main([*options, "--steps", "2", "--batch", "8"]) == 0
    assert "of 16 held-out numbers translated without a mistake" in capsys.readouterr().out
    settings = [
        f"data.train.path={tmp_path / 'train.jsonl'}",
        f"data.eval.path={tmp_path / 'held_out.jsonl'}",
    ]
    settings += [f"stages.{index}.{key}" for index in (1, 3) for key in ("steps=2", "batch=8")]
    settings += [f"stages.{index}.latency_tokens=[1]" for index in (0, 2, 5)]
    command = [
        "run",
        "seq2seq_translation",
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "sparse"),
    ]
    result = CliRunner().invoke(app, [*command, *(part for text in settings for part in ("--set", text))])
    assert result.exit_code == 0, result.output
    assert sparse_modules(reader.load(tmp_path / "sparse"))
    assert toy_translation.main([*options, "--check", str(tmp_path / "sparse")]) == 0
    assert "of 16 held-out numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "50"], "got 50 numbers to train on"),
        (["--train", "999999"], "no more than 1,000,000 together"),
        (["--width", "100"], "got width 100 and 3 layers"),
        (["--check", "missing"], "held_out.jsonl"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys, options: list[str], message: str) -> None:
    assert toy_translation.main(["--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_data_alone_leave_no_model(tmp_path: Path) -> None:
    assert toy_translation.main(["--out", str(tmp_path), "--train", "100", "--data-only"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.jsonl", "train.jsonl"]
