"""Layers that would be slower block-sparse on this machine stay dense, and everybody is told so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparsify import pipeline
from sparsify.blocks import BlockShape
from sparsify.checkpoint import reader
from sparsify.cli.main import app
from sparsify.errors import ConfigError
from sparsify.kernels import dispatch
from sparsify.kernels.tuning_files import Candidate, Entry, device_name, user_file, write
from sparsify.layers.swap import sparse_modules
from sparsify.plan import make_plan
from sparsify.prediction import Prediction, break_even, predict, warning
from sparsify.recipe.schema import Recipe
from sparsify.runtime.progress import Progress
from tests.cli import checkpoints

CPU, F32, BLOCK = torch.device("cpu"), torch.float32, BlockShape(32, 32)
UP, DOWN, SQUARE, NARROW = (200, 128), (128, 200), (128, 128), (64, 128)
PRUNE = {"stage": "prune", "block": "32x32", "sparsity": 0.5, "scope": "layer"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dispatch.forget()
    yield
    dispatch.forget()


def measured(speedups: dict[tuple[int, int], dict[int, float]], density: float = 0.5) -> None:
    """Puts measurements of this machine where `sparsify tune` would, as (N, K): {tokens: speed-up}."""
    entries = [
        Entry(
            "dsd", "float32", (32, 32), shape, density, tokens, 100.0, {Candidate("reference"): 100.0 / ratio}
        )
        for shape, own in speedups.items()
        for tokens, ratio in own.items()
    ]
    write(user_file(device_name(CPU)), entries, {})
    dispatch.forget()


class TestPrediction:
    def test_few_and_many_tokens_count_the_same(self):
        assert Prediction({1: 2.0, 16: 2.0, 256: 0.5}).overall == pytest.approx(1)
        assert Prediction({1: 0.9, 256: 2.0, 2048: 3.0}).overall == pytest.approx((0.9 * 6**0.5) ** 0.5)
        assert Prediction({16: 0.99}).slower and not Prediction({16: 1.0}).slower

    def test_says_what_it_knows(self):
        text = "0.71x the speed of dense (1.00x at 1 token, 0.50x at 256)"
        assert str(Prediction({1: 1.0, 256: 0.5})) == text

    def test_only_what_was_measured_nearby_is_predicted(self):
        assert predict(CPU, F32, BLOCK, UP, 0.5) is None
        measured({UP: {1: 2.0, 4096: 3.0}})
        prediction = predict(CPU, F32, BLOCK, UP, 0.5)
        assert prediction is not None and prediction.speedups == {
            1: pytest.approx(2),
            2048: pytest.approx(3, rel=1e-3),
        }
        assert predict(CPU, F32, BLOCK, (2000, 128), 0.5) is None
        assert predict(CPU, torch.bfloat16, BLOCK, UP, 0.5) is None

    def test_break_even_lies_where_the_times_cross(self):
        # Sparse time 40 + 160 d of dense 100: equal at d = 0.375.
        measured({UP: {16: 100 / 120}}, 0.5)
        measured({UP: {16: 100 / 56}}, 0.1)
        assert break_even(CPU, F32, BLOCK, UP) == pytest.approx(0.63)
        assert break_even(CPU, F32, BLOCK, UP, above=0.8) == pytest.approx(0.8)
        assert break_even(CPU, F32, BLOCK, (2000, 128)) is None

    def test_a_warning_counts_layers_and_gives_the_break_even(self):
        shapes = [UP, UP, DOWN, SQUARE]
        assert warning(CPU, F32, BLOCK, shapes, 0.5) is None
        measured({UP: {16: 100 / 120}, DOWN: {16: 2.0}}, 0.5)
        measured({UP: {16: 100 / 56}, DOWN: {16: 4.0}}, 0.1)
        line = warning(CPU, F32, BLOCK, shapes[:3], 0.5)
        assert line is not None and line.startswith(
            "at 50% sparsity 2 of 3 layers in blocks of 32x32 are predicted to run at 0.83x the speed of dense"
        )
        assert "break even at 63%" in line
        assert warning(CPU, F32, BLOCK, shapes[:3], 0.8) is None

    def test_a_warning_without_break_even_says_so(self):
        measured({UP: {16: 0.5}})
        line = warning(CPU, F32, BLOCK, [UP], 0.5)
        assert line is not None and "break even at no measured sparsity" in line


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def about(self, word: str) -> list[str]:
        return [line for line in self.lines if word in line]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def recipe(tmp_path, dense):
    def make(*stages: str | dict, out: str = "out", **keys: Any) -> Recipe:
        listed = [{"stage": stage} if isinstance(stage, str) else stage for stage in stages]
        data = {"train": {"path": str(checkpoints.text(tmp_path)), "length": 32, "samples": 16}}
        values = {
            "version": 1,
            "model": str(dense),
            "out": str(tmp_path / out),
            "data": data,
            "stages": listed,
        }
        return Recipe.from_dict({**values, **keys})

    return make


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 37)[None]).logits


LOSES = {UP: {1: 0.8, 16: 0.7, 256: 0.6}, DOWN: {1: 2.0, 256: 3.0}, SQUARE: {1: 2.0}, NARROW: {1: 2.0}}
STAYS = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
         "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]  # fmt: skip


class TestConvert:
    def test_a_slower_layer_stays_dense_with_zeros_and_the_function_is_the_same(self, recipe, tmp_path):
        measured(LOSES)
        notes = Notes()
        result = pipeline.run(recipe(PRUNE, "convert", "report"), progress=notes)
        never = {"stage": "convert", "dense_where_slower": "never"}
        pipeline.run(recipe(PRUNE, never, out="never"))
        names = set(sparse_modules(result.model))
        assert names.isdisjoint(STAYS) and len(names) == 10
        assert len(sparse_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "never"))) == 14
        weight = load_file(tmp_path / "out" / "model.safetensors")[f"{STAYS[0]}.weight"]
        assert weight.shape == UP and 0.4 < (weight == 0).float().mean() < 0.6
        torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "never"), rtol=1e-4, atol=1e-5)
        (note,) = notes.about("dense_where_slower")
        assert "4 of 14 pruned weights stay dense" in note and "dense_where_slower: never" in note

    def test_report_and_inspect_say_which_and_why(self, recipe, tmp_path):
        measured(LOSES)
        report = pipeline.run(recipe(PRUNE, "convert", "report")).report
        assert report is not None
        kept = {entry["name"]: entry for entry in report["kept_dense"]}
        assert set(STAYS) < set(kept) and kept[STAYS[0]]["shape"] == list(UP)
        why = kept[STAYS[0]]["reason"]
        assert re.fullmatch(
            r"predicted 0\.6\dx the speed of dense \(0\.\d\dx at 1 token, 0.*, 0.*x at 256\) here", why
        )
        by_name = {entry["name"]: entry for entry in report["layers"]}
        assert by_name[STAYS[0]]["bytes"] == by_name[STAYS[0]]["bytes_dense"] == 4 * 200 * 128
        info = reader.open_checkpoint(tmp_path / "out")
        assert sorted(info.kept_dense) == STAYS and info.kept_dense[STAYS[0]] == why
        shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
        assert "pruned, and dense all the same: 4" in shown.stdout and STAYS[3] in shown.stdout
        document = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
        assert document["kept_dense"] == info.kept_dense

    def test_the_reason_survives_saving_again(self, recipe, tmp_path):
        measured(LOSES)
        pipeline.run(recipe(PRUNE, "convert"))
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
        assert sorted(reader.open_checkpoint(tmp_path / "again").kept_dense) == STAYS

    def test_where_every_layer_is_slower_the_checkpoint_is_dense(self, recipe, tmp_path):
        measured({shape: {16: 0.5} for shape in LOSES})
        result = pipeline.run(recipe(PRUNE, "convert", "report"))
        assert not sparse_modules(result.model)
        info = reader.open_checkpoint(tmp_path / "out")
        assert not info.layers and len(info.kept_dense) == 14
        assert logits(tmp_path / "out").isfinite().all()

    def test_a_machine_that_was_not_measured_packs_all_and_says_so_in_one_line(self, recipe):
        notes = Notes()
        result = pipeline.run(recipe(PRUNE, "convert"), progress=notes)
        assert len(sparse_modules(result.model)) == 14
        (note,) = notes.lines
        assert note.startswith("nothing like the 14 pruned weights was measured") and device_name(CPU) in note

    def test_a_layer_that_keeps_all_its_blocks_stays_dense(self, recipe, tmp_path):
        name = "model.layers.1.mlp.down_proj"
        whole = {**PRUNE, "sparsity": 0.0, "targets": [name]}
        result = pipeline.run(recipe({**PRUNE, "ignore": [name]}, whole, "convert", "report"))
        assert len(sparse_modules(result.model)) == 13 and name not in sparse_modules(result.model)
        assert result.report is not None and result.report["slower"] == {name: "keeps all its blocks"}
        assert reader.open_checkpoint(tmp_path / "out").kept_dense == {name: "keeps all its blocks"}

    def test_never_says_nothing(self, recipe):
        notes = Notes()
        pipeline.run(recipe(PRUNE, {"stage": "convert", "dense_where_slower": "never"}), progress=notes)
        assert notes.lines == []

    def test_the_density_of_each_layer_decides(self, recipe):
        # At half density a loss, at a tenth a gain: under one global budget some layers are on either side.
        measured({shape: {16: 0.8} for shape in LOSES}, 0.5)
        measured({shape: {16: 4.0} for shape in LOSES}, 0.1)
        result = pipeline.run(recipe({**PRUNE, "scope": "global"}, "convert", "report"))
        assert result.report is not None
        packed = sparse_modules(result.model)
        for entry in result.report["layers"]:
            prediction = predict(CPU, F32, BLOCK, tuple(entry["shape"]), entry["density"])
            assert prediction is not None and (entry["name"] in packed) == (not prediction.slower)
        assert 0 < len(packed) < 14

    def test_experts_are_packed_unpredicted(self, tmp_path):
        from tests.architectures.zoo import BY_NAME

        model = BY_NAME["mixtral"].build()
        model.save_pretrained(tmp_path / "dense")
        block = str(BlockShape.parse(BY_NAME["mixtral"].block))
        values = {"version": 1, "model": str(tmp_path / "dense"), "out": str(tmp_path / "out"),
                  "stages": [{**PRUNE, "block": block}, {"stage": "convert"}]}  # fmt: skip
        result = pipeline.run(Recipe.from_dict(values))
        assert any("experts" in name for name in sparse_modules(result.model))

    def test_an_unknown_policy_is_refused(self):
        stages = [PRUNE, {"stage": "convert", "dense_where_slower": "always"}]
        with pytest.raises(ConfigError, match="dense_where_slower"):
            Recipe.from_dict({"version": 1, "stages": stages})


TRAIN = {
    "stage": "finetune",
    "steps": 4,
    "batch": 4,
    "learning_rate": 2e-3,
    "heal": "packed",
    "save_steps": 1,
}


class TestHeal:
    def test_packed_healing_trains_what_stays_dense_under_its_mask(self, recipe, tmp_path):
        measured(LOSES)
        train = {**TRAIN, "trainer": {"max_grad_norm": 0.0}}
        pipeline.run(recipe(PRUNE, train, "convert", out="mixed"))
        pipeline.run(recipe(PRUNE, {**train, "heal": "masked"}, "convert", out="masked"))
        never = {"stage": "convert", "dense_where_slower": "never"}
        pipeline.run(recipe(PRUNE, train, never, out="packed"))
        counts = {
            out: len(sparse_modules(AutoModelForCausalLM.from_pretrained(tmp_path / out)))
            for out in ("mixed", "masked", "packed")
        }
        assert counts == {"mixed": 10, "masked": 10, "packed": 14}
        for out in ("masked", "packed"):
            torch.testing.assert_close(
                logits(tmp_path / "mixed"), logits(tmp_path / out), rtol=1e-3, atol=1e-3
            )
        weight = load_file(tmp_path / "mixed" / "model.safetensors")[f"{STAYS[0]}.weight"]
        assert 0.4 < (weight == 0).float().mean() < 0.6

    def test_an_interrupted_healing_goes_on_with_the_same_choice(self, recipe, tmp_path):
        class Stop(Notes):
            def stage(self, index: int, count: int, name: str) -> None:
                if name == "convert":
                    raise KeyboardInterrupt

        measured(LOSES)
        stages = (PRUNE, TRAIN, "convert", "report")
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe(*stages), progress=Stop())
        measured({shape: {1: 0.1, 16: 0.1, 256: 0.1} for shape in LOSES})  # would decide otherwise
        result = pipeline.run(recipe(*stages), resume=True)
        assert len(sparse_modules(result.model)) == 10
        assert result.report is not None and sorted(result.report["slower"]) == STAYS


class TestPlan:
    def test_a_plan_tells_the_break_even_before_the_work(self, recipe, dense, tmp_path):
        measured({shape: {16: 0.8} for shape in LOSES}, 0.5)
        measured({shape: {16: 4.0} for shape in LOSES}, 0.1)
        plan = make_plan(recipe(PRUNE, "convert"))
        (note,) = plan.notes
        assert "at 50% sparsity 14 of 14 layers in blocks of 32x32 are predicted to run at 0.80x" in note
        assert plan.bytes_out == plan.bytes_dense  # nothing will be packed
        never = {"stage": "convert", "dense_where_slower": "never"}
        assert make_plan(recipe(PRUNE, never)).bytes_out < 0.7 * plan.bytes_dense
        assert make_plan(recipe({**PRUNE, "sparsity": 0.8}, "convert")).notes == []
        assert make_plan(recipe(PRUNE, {"stage": "convert", "format": "dense"})).notes == []

    def test_prune_prints_it(self, dense, tmp_path):
        measured({shape: {16: 0.8} for shape in LOSES}, 0.5)
        measured({shape: {16: 4.0} for shape in LOSES}, 0.1)
        command = [
            "prune",
            str(dense),
            "--out",
            str(tmp_path / "out"),
            "--block",
            "32x32",
            "--scope",
            "layer",
        ]
        dry = CliRunner().invoke(app, [*command, "--dry-run"])
        assert "note: at 50% sparsity 14 of 14 layers" in dry.stdout.replace("\n", " ")
        done = CliRunner().invoke(app, [*command, "--dense-where-slower", "never"])
        assert done.exit_code == 0, done.output
        assert "note: at 50% sparsity 14 of 14 layers" in done.stderr and "break even at" in done.stderr
        assert len(reader.open_checkpoint(tmp_path / "out").layers) == 14
        auto = CliRunner().invoke(app, [*command, "--force"])
        assert auto.exit_code == 0, auto.output
        assert "stays dense: 15" in auto.stdout and "predicted 0." in auto.stdout
        wrong = CliRunner().invoke(app, [*command, "--force", "--dense-where-slower", "always"])
        assert wrong.exit_code == 2 and "dense_where_slower" in wrong.stderr
