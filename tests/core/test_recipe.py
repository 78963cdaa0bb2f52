"""Recipes: what they may say, how faults are reported, how settings override them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsify.blocks import BlockShape
from sparsify.errors import ConfigError
from sparsify.recipe.file import packaged
from sparsify.recipe.schema import FinetuneStage, PruneStage, Recipe

MINIMAL = {
    "version": 1,
    "model": "dense",
    "out": "sparse",
    "stages": [{"stage": "prune"}, {"stage": "convert"}],
}
FULL = """\
# A recipe for tests.
version: 1
name: full
model: dense
out: sparse
task: causal-lm
data:
  train: {path: train.txt, length: 128}
  eval: {name: wikitext, config: wikitext-2-raw-v1, split: test, columns: text}
  calibration: {path: train.csv, columns: [0, 1]}
stages:
  - stage: evaluate
  - stage: calibrate
    samples: 16
  - stage: prune
    block: 128x16
    sparsity: 0.5
    targets: re:.*mlp.*
  - stage: finetune
    steps: 10
    learning_rate: 1e-4
    trainer: {optim: adafactor}
  - stage: convert
  - stage: evaluate
    latency_tokens: [1, 64]
  - stage: report
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def prune_stage(recipe: Recipe, index: int = 0) -> PruneStage:
    stage = recipe.stages[index]
    assert isinstance(stage, PruneStage)
    return stage


def with_stage(**keys: object) -> dict:
    return {**MINIMAL, "stages": [{"stage": "prune", **keys}]}


def test_reads_every_stage_and_its_types(tmp_path):
    recipe = Recipe.load(write(tmp_path, FULL))
    assert [stage.stage for stage in recipe.stages] == [
        "evaluate", "calibrate", "prune", "finetune", "convert", "evaluate", "report"
    ]  # fmt: skip
    prune = prune_stage(recipe, 2)
    assert prune.block == BlockShape(128, 16)
    assert prune.targets == ["re:.*mlp.*"]
    finetune = recipe.stages[3]
    assert isinstance(finetune, FinetuneStage)
    assert finetune.learning_rate == 1e-4  # PyYAML alone reads 1e-4 as a string
    assert recipe.data.eval is not None and recipe.data.eval.columns == ["text"]
    assert recipe.data.calibration is not None and recipe.data.calibration.columns == ["0", "1"]


def test_yaml_round_trip_is_equal(tmp_path):
    recipe = Recipe.load(write(tmp_path, FULL))
    assert Recipe.load(write(tmp_path, recipe.to_yaml())) == recipe


def test_all_faults_at_once_with_line_and_suggestion(tmp_path):
    text = FULL.replace("model: dense", "modle: dense").replace(
        "sparsity: 0.5", "sparsty: 0.5\n    sparsity: 1.0"
    )
    text = text.replace("128x16", "48").replace("- stage: report", "- stage: reprot")
    with pytest.raises(ConfigError) as caught:
        Recipe.load(write(tmp_path, text))
    message = str(caught.value)
    assert "5 faults" in message
    assert "line 4: modle: unknown key; did you mean 'model'?" in message
    assert "line 16: stages.2.block: block shape 48x48 is not supported" in message
    assert "line 17: stages.2.sparsty: unknown key; did you mean 'sparsity'?" in message
    assert "line 18: stages.2.sparsity: must be at least 0 and less than 1, got 1" in message
    assert "stages.6: unknown stage 'reprot'; did you mean 'report'?" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block": 0}, "block shape 0x0 is not supported"),
        ({"block": 48}, "each side must be a power of two from 8 to 256"),
        ({"block": "3x5"}, "block shape 3x5 is not supported"),
        ({"block": "wide"}, "cannot read block shape 'wide'"),
        ({"sparsity": 1}, "must be at least 0 and less than 1, got 1"),
        ({"sparsity": 50}, "for 50 % write 0.5"),
        ({"sparsity": -0.1}, "stages.0.sparsity: got -0.1"),
        ({"sparsity": float("nan")}, "stages.0.sparsity: got nan"),
        ({"sparsity": "half"}, "stages.0.sparsity: got 'half'"),
        (
            {"scope": "globl"},
            "got 'globl', expected global, layer, row, erdos_renyi, outlier, sensitivity or ",
        ),
        ({"floor": 0.8, "ceiling": 0.2}, "floor 0.8 is above ceiling 0.2"),
        ({"floor": 0.8, "sparsity": 0.5}, "floor 0.8 cannot be kept at sparsity 0.5"),
        ({"ceiling": 0.2, "sparsity": 0.5}, "ceiling 0.2 cannot be kept at sparsity 0.5"),
        ({"scope": "sensitivity"}, "the scope sensitivity needs the key `sensitivity` (--sensitivity)"),
        ({"sensitivity": "file.json"}, "is for the scope sensitivity, not for global"),
        ({"method": "magnitud"}, "unknown pruner 'magnitud': did you mean 'magnitude'"),
        ({"method": "no_such_module:Pruner"}, "cannot import pruner 'no_such_module:Pruner'"),
        ({"options": {"nrom": "l2"}}, "has no option 'nrom': did you mean 'norm'"),
        ({"sparsty": 0.5}, "stages.0.sparsty: unknown key; did you mean 'sparsity'?"),
    ],
    ids=lambda value: (
        next(iter(value)) + "=" + str(next(iter(value.values()))) if isinstance(value, dict) else ""
    ),
)
def test_refuses_a_bad_pruning_value(keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Recipe.from_dict(with_stage(**keys))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["report", "prune"], "report must be the last stage"),
        (["convert"], "there is nothing to convert: no earlier stage prunes"),
        (["prune", "convert", "convert"], "the model is converted already"),
        (["prune", "convert", "prune"], "nothing can be pruned once the weights are packed"),
        (["calibrate"], "no later stage prunes"),
        (["calibrate", "prune"], "calibrate needs data.calibration"),
        (["prune", {"stage": "finetune", "steps": 1}], "finetune needs data.train"),
        (["prune", {"stage": "finetune"}], "needs exactly one of `steps` and `epochs`"),
        (["prune", {"stage": "finetune", "steps": 1, "epochs": 1}], "or empty it, as in --set stages.1"),
        ([{"stage": "finetune", "steps": 1, "heal": "packed"}], "there are no blocks to pack yet"),
        (
            ["prune", "convert", {"stage": "finetune", "steps": 1, "heal": "masked"}],
            "cannot be trained under a mask",
        ),
        (
            [{"stage": "finetune", "steps": 1, "heal": "packed", "pruner": {}}],
            "searches the mask and cannot heal",
        ),
        (
            [
                "prune",
                {"stage": "finetune", "steps": 1, "heal": "packed"},
                {"stage": "convert", "format": "dense"},
            ],
            "a later stage converts to dense weights",
        ),
        ([{}], "a stage needs a `stage:` key"),
        ([], "stages: got \\[\\]"),
    ],
)
def test_refuses_stages_that_do_not_fit_together(stages, message):
    listed = [{"stage": stage} if isinstance(stage, str) else stage for stage in stages]
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({**MINIMAL, "stages": listed})
    if listed and listed[0]:
        with pytest.raises(ValueError, match=message):
            Recipe(**{**MINIMAL, "stages": listed})


def test_overrides_by_path_stage_name_and_new_section():
    recipe = Recipe.from_dict(
        MINIMAL,
        overrides=[
            "stages.0.sparsity=0.6",
            "prune.scope=layer",
            "data.train.path=a.txt",
            "prune.options.norm=l1",
        ],
        values={"model": "other", "out": None},
    )
    prune = prune_stage(recipe)
    assert (prune.sparsity, prune.scope, prune.options) == (0.6, "layer", {"norm": "l1"})
    assert recipe.data.train is not None and recipe.data.train.path == "a.txt"
    assert (recipe.model, recipe.out) == ("other", "sparse")
    assert MINIMAL["stages"][0] == {"stage": "prune"}  # the given data stays as it was


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prune.sparsity", "expected key=value"),
        ("pruen.sparsity=1", "no key or stage is called 'pruen'; did you mean 'prune'"),
        ("stages.7.sparsity=0.5", "stages has the entries 0 to 1, got '7'"),
        ("model.path=x", "model is 'dense', which has no key 'path'"),
        ("prune.sparsty=0.5", "unknown key; did you mean 'sparsity'"),
        ("prune.targets=[a", "is not a YAML value"),
    ],
)
def test_refuses_a_bad_override(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Recipe.from_dict(MINIMAL, overrides=[setting])


def test_override_by_stage_name_must_be_unique():
    stages = [{"stage": "evaluate"}, {"stage": "prune"}, {"stage": "evaluate"}]
    with pytest.raises(ConfigError, match=r"2 evaluate stages; write stages\.0 or stages\.2"):
        Recipe.from_dict({**MINIMAL, "stages": stages}, overrides=["evaluate.label=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nname: a\nname: b\nstages: []\n", "line 3: key 'name' is given twice, first on line 2"),
        ("version: [1\n", "not YAML"),
        ("- prune\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("version: 2\nstages: [{stage: prune}]\n", "line 1: version: got 2, expected 1"),
        ("stages: [{stage: prune}]\n", "version: is missing"),
    ],
)
def test_refuses_a_file_that_is_no_recipe(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.load(write(tmp_path, text))


def test_override_by_the_name_of_a_section_of_a_stage():
    train = {"stage": "finetune", "steps": 4, "distill": {"task": 0}}
    stages = [{**train, "pruner": {"method": "magnitude"}}, train]
    values = {**MINIMAL, "data": {"train": {"path": "text.txt"}}, "stages": stages}
    recipe = Recipe.from_dict(values, overrides=["pruner.sparsity=0.75", "pruner.block=32x32"])
    search = recipe.stages[0]
    assert isinstance(search, FinetuneStage) and search.pruner is not None
    assert (search.pruner.sparsity, str(search.pruner.block)) == (0.75, "32x32")
    with pytest.raises(
        ConfigError, match=r"2 distill sections; write stages\.0\.distill or stages\.1\.distill"
    ):
        Recipe.from_dict(values, overrides=["distill.hidden=0"])
    with pytest.raises(ConfigError, match=r"called 'prunr'; did you mean 'pruner'"):
        Recipe.from_dict(values, overrides=["prunr.sparsity=0.75"])


def test_missing_file_and_unknown_name(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="no recipe file or packaged recipe is called 'magnitude_oneshoot'"):
        Recipe.load("magnitude_oneshoot")


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_are_valid_and_say_how_to_run_them(name):
    from sparsify.recipe.file import locate

    recipe = Recipe.load(name)
    assert recipe.description
    header = locate(name).header
    assert "Needs:" in header
    assert f"sparsify run {name}" in header or f"recipes/{name}.yaml" in header


def test_a_search_needs_a_step_between_warm_up_and_healing():
    stage = {
        "stage": "finetune",
        "steps": 10,
        "pruner": {"method": "group_lasso", "start": 0.7, "until": 0.6},
    }
    values = {**MINIMAL, "data": {"train": {"path": "text.txt"}}, "stages": [stage]}
    with pytest.raises(
        ConfigError, match=r"pruner: start 0.7 is not before until 0.6: no step is left to prune"
    ):
        Recipe.from_dict(values)
