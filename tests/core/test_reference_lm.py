"""The reference language model: what is read, how it is packed, and what the command leaves behind."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reference_lm

TEXT = "It was a bright cold day — the clocks were striking.\n\nNobody counted the strokes, not even Zoë.\n\n"


def archive(path: Path, texts: dict[str, str]) -> None:
    with tarfile.open(path, "w:xz") as books:
        for name, text in texts.items():
            content = text.encode("utf-8")
            member = tarfile.TarInfo(f"Somebody/{name}.md")
            member.size = len(content)
            books.addfile(member, io.BytesIO(content))


def book(title: str, text: str) -> str:
    return f"# Title: {title}\n\n## Author: Somebody\n\n-------\n\n{text}"


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for part in ("train-0", "train-1"):
        texts = {f"{part} {n}": book(f"{part} {n}", f"Book {part} {n}. " + TEXT * 20) for n in range(2)}
        archive(folder / f"books-{part}.tar.xz", texts)
    archive(folder / "books-valid.tar.xz", {"last": book("last", "Another one. " + TEXT * 80)})
    return folder


def test_books_come_in_order_and_without_their_headers(books: Path):
    texts = reference_lm.read_books(books, "train")
    assert [text.split(". ")[0] for text in texts] == [f"Book train-{a} {n}" for a in (0, 1) for n in (0, 1)]
    assert all(text.endswith("Zoë.") for text in texts)
    assert reference_lm.read_books(books, "train", 1) == texts[::2]


def test_blocks_hold_the_texts_with_an_end_token_after_each(books: Path):
    texts = reference_lm.read_books(books, "train")
    tokenizer = reference_lm.make_tokenizer(texts)
    blocks = reference_lm.pack(texts, tokenizer)
    joined = "".join(text + reference_lm.END for text in texts)
    assert blocks.shape[1] == reference_lm.LENGTH and len(blocks) > 0
    assert joined.startswith(tokenizer.decode(blocks.flatten().tolist()))
    # What the model learns from is cut like what it is measured on.
    measured = reference_lm.held_out_blocks(texts, tokenizer)
    assert torch.equal(measured["input_ids"][:], torch.from_numpy(blocks.astype("int64")))
    assert len(reference_lm.held_out_blocks(texts, tokenizer, 1)) == 1


def test_the_command_leaves_a_checkpoint_with_its_record(books: Path, tmp_path: Path, capsys):
    wikitext = tmp_path / "valid.txt.xz"
    wikitext.write_bytes(lzma.compress((" = Zoë = \n" + TEXT * 80).encode("utf-8")))
    out = tmp_path / "out"
    command = ["--books", str(books), "--wikitext", str(wikitext), "--out", str(out), "--device", "cpu"]
    command += ["--steps", "2", "--batch", "1", "--max-books", "1"]
    assert reference_lm.main(command) == 0
    record = json.loads((out / "training.json").read_text())
    assert set(record["quality"]) == {"train", "books-valid", "wikitext-2-valid"}
    assert [point["step"] for point in record["curve"]] == [1, 2] and record["parameters"] < 20_000_000
    assert record["sha256"] == reference_lm.sha256(out) and record["sha256"] in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT

    assert reference_lm.main(command) == 2
    assert f"{out} exists" in capsys.readouterr().err


def test_faults_are_one_line(books: Path, tmp_path: Path, capsys):
    def fault(*extra: str) -> str:
        command = ["--books", str(books), "--out", str(tmp_path / "out"), "--device", "cpu", *extra]
        assert reference_lm.main(command) == 2
        return capsys.readouterr().err

    assert "do not fill a batch of 999" in fault("--batch", "999")
    assert "no books-valid*.tar.xz" in fault("--books", str(tmp_path))
    archive(books / "books-train-2.tar.xz", {"bare": "No header."})
    assert "Somebody/bare.md has no line `-------`" in fault()
    (books / "books-train-0.tar.xz").write_bytes(b"not an archive")
    assert "books-train-0.tar.xz cannot be read" in fault()
