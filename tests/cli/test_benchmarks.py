"""Public benchmarks, by lm-eval, beside our own arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import sparsify
from sparsify import benchmarks
from sparsify.cli.main import app
from sparsify.errors import ConfigError
from sparsify.stages.report import measures, table
from sparsify.stages.report_page import change
from tests.cli import checkpoints

slow = pytest.mark.slow  # lm-eval reads its thousands of tasks

QUESTIONS = [
    {"question": f"is {number} a number?", "choices": ["no", "yes it is", "maybe"], "answer": number % 3}
    for number in range(12)
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A benchmark of one's own: twelve questions with three answers each."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    file = tmp_path / "numbers.yaml"
    file.write_text(
        "task: numbers\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return file


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return checkpoints.llama(tmp_path / "dense")


def right(folder: Path) -> float:
    """Share of the questions whose right answer is the likeliest, by the definition."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(chances.gather(1, ids[0, 1:, None])[start - 1 :].sum())
        count += int(torch.stack(scores).argmax()) == row["answer"]
    return count / len(QUESTIONS)


def evaluate(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_dense_and_sparse_side_by_side(dense, task, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    sparsify.prune(model, method="magnitude", block="32x32", sparsity=0.5)
    sparsify.save(model, tmp_path / "sparse", processor=checkpoints.tokenizer())
    done = evaluate(
        tmp_path / "sparse",
        "--against",
        dense,
        "--benchmark",
        task,
        "--tokens",
        0,
        "--json",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.output
    columns = json.loads(done.stdout)["columns"]
    for label, folder in (("dense", dense), ("sparse", tmp_path / "sparse")):
        score, error = columns[label]["benchmarks"]["numbers acc"]
        assert score == pytest.approx(right(folder))
        assert error == pytest.approx((score * (1 - score) / 11) ** 0.5)


def test_limit_and_examples(dense, task):
    report = sparsify.api.evaluate(
        dense, benchmarks=[str(task)], limit=1, shots=2, latency_tokens=(), device="cpu"
    )
    score, error = report["columns"]["dense"]["benchmarks"]["numbers acc"]
    assert score in (0.0, 1.0)
    assert error is None or error == 0.0


def test_a_recipe_reports_them(dense, task, tmp_path):
    stages = [
        {"stage": "evaluate", "latency_tokens": [], "benchmarks": [str(task)]},
        {"stage": "prune", "method": "magnitude", "block": "32x32", "sparsity": 0.5},
        {"stage": "convert"},
        {"stage": "evaluate", "latency_tokens": [], "benchmarks": [str(task)], "limit": 6},
        {"stage": "report"},
    ]
    recipe = {
        "version": 1,
        "model": str(dense),
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "stages": stages,
    }
    report = sparsify.run(sparsify.Recipe.from_dict(recipe)).report or {}
    assert set(report["columns"]["pruned"]["benchmarks"]) == {"numbers acc"}
    page = (tmp_path / "out" / "sparsify_report.html").read_text()
    assert "numbers acc" in page


def test_how_scores_are_written():
    columns = {
        "dense": {"benchmarks": {"arc acc": (0.5, 0.01)}},
        "sparse": {"benchmarks": {"arc acc": (0.47, None)}},
    }
    (measure,) = measures(columns)
    assert change(measure) == "-0.0300"
    assert table(columns)[1] == [["arc acc", "0.5000 \N{PLUS-MINUS SIGN} 0.0100", "0.4700"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--benchmark", "arc_esay"], "unknown benchmark 'arc_esay'", id="unknown", marks=slow),
        pytest.param(["--benchmark", "absent.yaml"], "unknown benchmark 'absent.yaml'", id="no-file"),
        pytest.param(
            ["--benchmark", "arc_easy", "--task", "masked-lm"],
            "models that generate text",
            id="no-generation",
        ),
        pytest.param(["--benchmark", "arc_easy"], "benchmarks arc_easy:", id="no-network", marks=slow),
    ],
)
def test_one_line_says_what_is_wrong(dense, arguments, said):
    done = evaluate(dense, *arguments, "--tokens", 0, "--device", "cpu")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert said in line


def test_without_lm_eval(monkeypatch):
    benchmarks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"block-sparsify\[eval\]"):
        benchmarks.check(["arc_easy"])
