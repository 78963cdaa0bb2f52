"""The quickstart's text and language model: what is shipped, and the commands that make it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo_corpus
import demo_model

DEMO = Path(demo_model.__file__).parents[1] / "recipes" / "demo"
SENTENCE = "Return the number of {} that {} the given {} when the second argument is {}."
WORDS = ["items", "match", "pattern", "missing", "bytes", "follow", "header", "true", "names", "precede"]


@pytest.fixture(scope="module")
def corpus() -> demo_corpus.Corpus:
    return demo_corpus.collect()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def prose(seed: int, count: int = 40) -> str:
    """Return ``count`` different sentences."""
    picks = [[WORDS[(seed + i * (k + 1) + k) % len(WORDS)] for k in range(4)] for i in range(count)]
    return "\n\n".join(f"{SENTENCE.format(*pick)} Case {seed} number {i}." for i, pick in enumerate(picks))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library with two modules in each part, and everything that has to be left out."""
    root = tmp_path / "lib"
    root.mkdir()
    wanted = dict.fromkeys(demo_corpus.PARTS, 2)
    for number in range(1000):
        name = f"module{number}"
        part = demo_corpus.part_of(name)
        if wanted[part]:
            wanted[part] -= 1
            comment = f"# Written in comments: this explains {name} in some more words\n# that end here."
            (root / f"{name}.py").write_text(f'"""{prose(number)}"""\n\n{comment}\n')
    (root / "test").mkdir()
    (root / "test" / "test_it.py").write_text(f'"""{prose(5000, 1)}"""')
    return root


def test_shipped_files_are_a_small_safe_checkpoint():
    names = {path.name for path in DEMO.iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (DEMO / "model.safetensors").stat().st_size < demo_model.SIZE_LIMIT


def test_shipped_model_loads_whole_and_has_realistic_features():
    model, report = AutoModelForCausalLM.from_pretrained(DEMO, output_loading_info=True)
    config = model.config
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert 3_000_000 < model.num_parameters() < 4_500_000
    assert config.hidden_size >= 384
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = load_file(DEMO / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in stored.values())


def test_shipped_config_is_what_the_command_would_build(tokenizer):
    built = demo_model.make_model(demo_model.Settings()).config.to_dict()
    shipped = json.loads((DEMO / "config.json").read_text())
    same = set(shipped) - {"architectures", "dtype", "transformers_version"}
    assert {key: shipped[key] for key in same} == {key: built[key] for key in same}
    assert len(tokenizer) == shipped["vocab_size"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)


@pytest.mark.parametrize(
    "text",
    ["Return a list.", "  two  blanks\n\nand lines\n", "tabs\tand ünïcödé ☃", "x = f(y)[0] # no prose", ""],
    ids=["prose", "blanks", "unicode", "code", "empty"],
)
def test_tokenizer_round_trip(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("separator", ["end token", "blank line"])
def test_shipped_model_predicts_heldout_text(corpus, tokenizer, separator: str):
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    text = corpus.texts["heldout"][:6000]
    if separator == "end token":
        stream = demo_model.encode(text, tokenizer)
    else:
        stream = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    total, count = demo_model.evaluate(model, stream, 512)
    assert total / count < 0.52 * math.log(model.config.vocab_size)
    assert total / math.log(2) / len(text.encode()) < 1.9


def test_shipped_model_writes_a_sentence(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    prompt = tokenizer("The function returns", return_tensors="pt")
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    sentence = tokenizer.decode(tokens[0], skip_special_tokens=True).splitlines()[0]
    assert sentence.endswith(".") and 5 <= len(sentence.split()) <= 24


def test_corpus_is_large_and_english(corpus):
    sizes = {part: len(text) for part, text in corpus.texts.items()}
    assert sizes["train"] > 1_000_000 and min(sizes.values()) > 50_000
    for text in corpus.texts.values():
        assert text.isascii() and "\n\n\n" not in text and ">>>" not in text
        assert text.lower().count(" the ") > len(text) / 200


def test_parts_share_no_module_and_no_paragraph(corpus):
    parts = {part: getattr(corpus, part) for part in demo_corpus.PARTS}
    paragraphs = {
        part: set("\n".join(d.text for d in documents).split("\n")) for part, documents in parts.items()
    }
    for one, other in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
        assert not {d.name for d in parts[one]} & {d.name for d in parts[other]}
        assert paragraphs[one] & paragraphs[other] <= {""}
    for part, documents in parts.items():
        assert all(demo_corpus.part_of(document.name) == part for document in documents)


def test_part_depends_on_the_name_alone():
    """Fixed for ever: the shipped model was trained on this division."""
    assert [demo_corpus.part_of(name) for name in ("logging", "inspect", "asyncio.events")] == [
        *("heldout", "validation", "train")
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [("_pyio.py", "io"), ("json/__init__.py", "json"), ("_pydatetime.py", "datetime"), ("a/_b.py", "a.b")],
)
def test_twins_of_c_modules_share_a_name(path: str, name: str):
    assert demo_corpus.module_name(Path(path)) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the\n  longest name of all.", ["Return the longest name of all."]),
        (">>> print(f(1))\n2", []),
        ("if x == y: return [z(i) for i in w]", []),
        ("Use :meth:`~a.close` to end the ``open`` file.", ['Use a.close to end the "open" file.']),
        ("- one of the first kind of thing\n- two of the\n  second kind of thing", None),
    ],
    ids=["joined", "doctest", "code", "markup", "bullets"],
)
def test_prose_is_kept_and_code_is_not(text: str, expected: list[str] | None):
    found = list(demo_corpus.paragraphs(text))
    if expected is None:
        expected = ["- one of the first kind of thing", "- two of the second kind of thing"]
    assert found == expected


def test_library_is_read_without_import_and_without_its_tests(library: Path):
    (library / "module_that_fails.py").write_text(f'"""{prose(7000, 2)}"""\nraise SystemExit("imported")\n')
    corpus = demo_corpus.collect(library)
    assert "Case 7000" in "".join(corpus.texts.values())
    assert "Case 5000" not in "".join(corpus.texts.values())
    assert "Written in comments" in corpus.texts["train"]
    assert "Written in comments" not in corpus.texts["validation"] + corpus.texts["heldout"]


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_corpus_is_the_same_in_every_process(library: Path, tmp_path: Path, hash_seed: str):
    arguments = ["--stdlib", str(library), "--out", str(tmp_path / "text")]
    result = subprocess.run(
        [sys.executable, demo_corpus.__file__, *arguments],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"fingerprint: {demo_corpus.collect(library).fingerprint}\n" in result.stdout


def test_unreadable_module_is_named(library: Path):
    (library / "broken.py").write_text("def (:\n")
    with pytest.warns(UserWarning, match=r"broken\.py is left out of the text"):
        demo_corpus.collect(library)


def test_corpus_command_writes_three_files_once(library: Path, tmp_path: Path, capsys):
    arguments = ["--stdlib", str(library), "--out", str(tmp_path / "text")]
    assert demo_corpus.main(arguments) == 0
    first = capsys.readouterr().out
    assert f"fingerprint: {demo_corpus.collect(library).fingerprint}" in first
    assert {p.name for p in (tmp_path / "text").iterdir()} == {"train.txt", "validation.txt", "heldout.txt"}
    assert demo_corpus.main(arguments) == 2
    assert "exists; pass --force" in capsys.readouterr().err
    assert demo_corpus.main([*arguments, "--force"]) == 0
    assert capsys.readouterr().out == first


def test_empty_library_is_one_clear_line(tmp_path: Path, capsys):
    assert demo_corpus.main(["--stdlib", str(tmp_path), "--out", str(tmp_path / "text")]) == 2
    assert capsys.readouterr().err.startswith("error: no Python source with documentation under")
    assert not (tmp_path / "text").exists()


@pytest.fixture
def determinism():
    """Undo the process-wide switches of a deterministic training."""
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    os.environ.clear()
    os.environ.update(environment)


def command(library: Path, out: Path, *extra: str) -> list[str]:
    small = ["--steps", "2", "--batch", "2", "--window", "64", "--device", "cpu"]
    return ["--stdlib", str(library), "--out", str(out), *small, *extra]


def test_training_command_is_reproducible_and_refuses_to_overwrite(
    library: Path, tmp_path: Path, capsys, determinism
):
    first, second = tmp_path / "first", tmp_path / "second"
    assert demo_model.main(command(library, first)) == 0
    assert "heldout_perplexity" in capsys.readouterr().out
    assert demo_model.main(command(library, second)) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert {p.name for p in first.iterdir()} == {p.name for p in DEMO.iterdir()}
    assert demo_corpus.collect(library).fingerprint in (first / "README.md").read_text()

    capsys.readouterr()
    assert demo_model.main(command(library, first)) == 2
    assert "exists; pass --force" in capsys.readouterr().err
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"lib", "first", "second"}


def test_force_leaves_a_folder_that_is_no_checkpoint_alone(library: Path, tmp_path: Path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    assert demo_model.main(command(library, tmp_path / "photos", "--force")) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_too_large_a_model_is_not_put_in_place(library: Path, tmp_path: Path, capsys, determinism):
    assert demo_model.main(command(library, tmp_path / "big", "--feed-forward", "2048")) == 2
    assert "the limit is 8,000,000" in capsys.readouterr().err
    assert not (tmp_path / "big").exists()
