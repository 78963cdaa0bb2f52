"""`SparsifyCallback` in anybody's Trainer and `SparsifyLoop` in anybody's loop: nothing loses the mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import sparsify
from sparsify import SparsifyCallback, SparsifyLoop
from sparsify.blocks import BlockMask
from sparsify.errors import CheckpointError, ConfigError
from sparsify.layers.kinds import matrices
from sparsify.layers.swap import masks_of
from sparsify.masking import current_masks
from sparsify.recipe.schema import Recipe

SETTINGS: dict[str, Any] = {"block": "16x8", "sparsity": 0.6, "start": 0.1, "until": 0.6}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
CODE = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
STEPS = 10


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def make_trainer(model: nn.Module, folder: Path, callback: SparsifyCallback, **options: Any) -> Trainer:
    tokens = torch.randint(0, 32, (64, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, callbacks=[callback])


class Watched(SparsifyCallback):
    """Remembers the masks in the moment in which they are fixed."""

    first: dict[str, BlockMask] | None = None

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        super().on_optimizer_step(args, state, control, **kwargs)
        if self.masks is not None and self.first is None:
            self.first = {name: BlockMask(m.keep.clone(), m.shape, m.block) for name, m in self.masks.items()}


def check(model: nn.Module, masks: dict[str, BlockMask] | None, sparsity: float = 0.6) -> None:
    """The dense model has zeros where the masks say so, bit for bit, and nowhere else; the budget is met."""
    assert masks is not None
    found = {
        layer.name: layer
        for name, module in model.named_modules()
        for layer in matrices(name, module, sparsify.BlockShape(16, 8))
    }
    for name, mask in masks.items():
        assert torch.equal(found[name].weight != 0, mask.elements()), name
    elements = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    kept = sum(mask.elements_kept for mask in masks.values())
    assert abs(kept - (1 - sparsity) * elements) <= 64


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor"},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
    "gradient checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_fixed_mask_is_the_final_one_bit_for_bit(case: str, tmp_path: Path):
    options = dict(CASES[case])
    if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__ and case.startswith(
        "gradient"
    ):
        options = {"gradient_checkpointing": True}  # its older name
    model, callback = make_model(), Watched(**SETTINGS)
    make_trainer(model, tmp_path, callback, **options).train()
    assert callback.first is not None and callback.loop.step == STEPS
    masks = callback.finish(convert=False)
    assert all(torch.equal(mask.keep, callback.first[name].keep) for name, mask in masks.items())
    check(model, callback.first)
    assert not any(module.__dict__.get("weight") is not None for module in model.modules())


@pytest.mark.parametrize(
    "step", [1, 4, 6, 8], ids=["at the begin", "between updates", "at the cut", "healing"]
)
def test_a_resumed_training_ends_with_the_same_bits(step: int, tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    ends = []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{step}")):
        torch.manual_seed(0)
        model, callback = make_model(), SparsifyCallback(**SETTINGS, every=3)
        trainer = make_trainer(model, tmp_path, callback, **saving)
        trainer.train(resume_from_checkpoint=checkpoint)
        callback.finish(convert=False)
        check(model, callback.masks)
        losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
        ends.append((model.state_dict(), losses))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())


def test_a_checkpoint_without_its_masks_is_refused(tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(make_model(), tmp_path, SparsifyCallback(**SETTINGS), **saving).train()
    (tmp_path / "checkpoint-4" / "sparsify_pruning.safetensors").unlink()
    trainer = make_trainer(make_model(), tmp_path, SparsifyCallback(**SETTINGS), **saving)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 cannot be resumed: .* take an earlier checkpoint"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_after_training_the_model_is_packed_saved_and_loaded(tmp_path: Path):
    model, callback = make_model(), SparsifyCallback(method="movement", **SETTINGS)
    make_trainer(model, tmp_path / "run", callback).train()
    ids = torch.arange(10)[None]
    expected = model.eval()(ids).logits
    masks = callback.finish()
    assert {name: mask.blocks_kept for name, mask in masks_of(model).items()} == {
        name: mask.blocks_kept for name, mask in masks.items()
    }
    sparsify.save(model, tmp_path / "sparse")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


SEARCH = {"stage": "finetune", "steps": 5, "pruner": {"method": "magnitude", **SETTINGS}}


@pytest.mark.parametrize(
    "source",
    [lambda r, folder: r, lambda r, folder: _written(r, folder / "mine.yaml"), lambda r, folder: None],
    ids=["recipe", "path", "keywords"],
)
def test_what_to_prune_comes_from_a_recipe_or_from_keywords(source: Callable, tmp_path: Path):
    recipe = Recipe.from_dict({"version": 1, "data": {"train": {"path": "text.txt"}}, "stages": [SEARCH]})
    given = source(recipe, tmp_path)
    callback = (
        SparsifyCallback(given, sparsity=0.5)
        if given is not None
        else SparsifyCallback(**{**SETTINGS, "sparsity": 0.5})
    )
    assert callback.search.sparsity == 0.5 and str(callback.search.block) == "16x8"
    assert (callback.search.start, callback.search.until) == (0.1, 0.6)
    assert SparsifyCallback("llm_gradual_distill", until=0.5).search.until == 0.5


def _written(recipe: Recipe, file: Path) -> Path:
    file.write_text(recipe.to_yaml())
    return file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "twice"}, "recipe twice prunes in 2 stages: here it must be one"),
        ({"recipe": "no_such_recipe"}, "no_such_recipe"),
        ({"sparsty": 0.5}, "unknown key; did you mean 'sparsity'"),
        ({"method": "wanda"}, "pruner 'wanda' needs the statistic 'input_sq'"),
    ],
    ids=["two prunings", "no recipe", "unknown key", "no calibration"],
)
def test_what_cannot_be_pruned_is_told_in_one_line(arguments: dict, message: str, tmp_path: Path):
    if arguments.get("recipe") == "twice":
        prune = {"stage": "prune", "block": "16x8"}
        arguments = {"recipe": Recipe.from_dict({"version": 1, "name": "twice", "stages": [prune, prune]})}
    with pytest.raises(ConfigError, match=message) as told:
        callback = SparsifyCallback(
            **{**({"block": "16x8"} if "recipe" not in arguments else {}), **arguments}
        )
        make_trainer(make_model(), tmp_path, callback).train()
    assert "\n" not in str(told.value)


def test_a_trainer_that_brings_back_its_best_checkpoint_is_refused(tmp_path: Path):
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), load_best_model_at_end=True, **steps)
    with pytest.raises(ConfigError, match="load_best_model_at_end would bring back weights"):
        SparsifyCallback(**SETTINGS).on_train_begin(
            arguments, TrainerState(max_steps=STEPS), TrainerControl(), model=make_model()
        )


def test_a_pruner_that_needs_inputs_gets_them_from_calibration_batches(tmp_path: Path):
    batches = [{"input_ids": torch.randint(0, 32, (4, 12))} for _ in range(2)]
    saving = {"save_strategy": "steps", "save_steps": 1}
    ends = []
    for checkpoint, calibration in ((None, batches), (str(tmp_path / "checkpoint-3"), None)):
        model = make_model()
        callback = SparsifyCallback(method="wanda", **SETTINGS, calibration=calibration)
        make_trainer(model, tmp_path, callback, **saving).train(resume_from_checkpoint=checkpoint)
        callback.finish(convert=False)
        check(model, callback.masks)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_pruning_that_is_not_over_cannot_be_finished(tmp_path: Path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = SparsifyLoop(model, optimizer, steps=10, **SETTINGS)
    with pytest.raises(ConfigError, match="0 of 10 steps are done, and the masks are fixed after step 6"):
        loop.finish()
    with pytest.raises(ConfigError, match="training has not begun"):
        SparsifyCallback(**SETTINGS).finish()


def test_the_documented_trainer_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(make_model(), tmp_path / "run", SparsifyCallback(**SETTINGS))
    names: dict[str, Any] = {
        "model": trainer.model,
        "arguments": trainer.args,
        "data": trainer.train_dataset,
    }
    code = next(code for code in CODE if "SparsifyCallback" in code)
    exec(code.replace("64x64", "16x8"), names)
    assert masks_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "path" / "to" / "sparse"))


def documented_loop(
    batches: list, folder: Path, resume: int | None = None, stop: int | None = None
) -> nn.Module:
    """Runs the documented lines with accelerate; may save after step `stop`, or go on from there."""
    accelerator, model = Accelerator(cpu=True), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    code = next(code for code in CODE if "SparsifyLoop" in code).replace("64x64", "16x8")
    lines = code.strip().splitlines()
    added = [line for line in lines if "loop" in line and not line.startswith("#")]
    assert len(added) == 3
    names: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "batches": batches,
        "accelerator": accelerator,
    }
    if stop is None and resume is None:
        exec(code, names)
        return model
    head, _, tail = code.partition("for batch in batches")
    exec(head, names)
    if resume is not None:
        accelerator.load_state(str(folder))
    names["batches"] = batches[:stop] if resume is None else batches[resume:]
    body, _, end = tail.partition("loop.finish()")
    exec("for batch in batches" + body, names)
    if resume is None:
        accelerator.save_state(str(folder))
    else:
        exec("loop.finish()" + end, names)
    return names["model"]


@pytest.mark.parametrize("step", [3, 12], ids=["searching", "healing"])
def test_the_documented_loop_lines_run_and_resume_to_the_same_bits(step: int, tmp_path: Path):
    ids = torch.randint(0, 32, (20, 4, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    whole = documented_loop(batches, tmp_path)
    documented_loop(batches, tmp_path / "state", stop=step)
    resumed = documented_loop(batches, tmp_path / "state", resume=step)
    assert masks_of(whole)
    first, second = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_loop_that_accumulates_moves_on_with_the_optimizer_alone():
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=4), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    loop = SparsifyLoop(model, optimizer, steps=5, **SETTINGS)
    for ids in torch.randint(0, 32, (20, 2, 12)):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert loop.step == 5
    assert current_masks(loop.model).keys() == (loop.masks or {}).keys()
    check(loop.model, loop.finish(convert=False))
