"""Pruning inside the Hugging Face Trainer: what the pruner sees, what a resumed run brings back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockShape
from sparsify.checkpoint.conversions import own_names
from sparsify.errors import ConfigError
from sparsify.masking import current_masks, mask_model, unmask
from sparsify.pruner import PrunableLayer, Pruner, create_pruner
from sparsify.targets import select
from sparsify.training.pruning_callback import PruningCallback

BLOCK = BlockShape(16, 8)


class Movement(Pruner):
    """A pruner of one's own, which keeps all that it knows in the layers' statistics."""

    def before_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        for layer in layers:
            assert layer.grad is not None
            blocks = -(layer.weight * layer.grad)
            total = layer.statistics.setdefault("movement", torch.zeros(layer.shape))
            total.add_(blocks)

    def score(self, layer: PrunableLayer) -> Tensor:
        return nn.functional.avg_pool2d(
            layer.statistics["movement"][None, None], (16, 8), ceil_mode=True, count_include_pad=False
        )[0, 0]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def make_trainer(model: nn.Module, folder: Path, callback: PruningCallback | None, **options) -> Trainer:
    tokens = torch.randint(0, 32, (64, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    settings = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    callbacks = [callback] if callback else []
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, callbacks=callbacks)


def make_callback(model: nn.Module, pruner: Pruner, until: float) -> PruningCallback:
    return PruningCallback(pruner, select(model, BLOCK).layers, Budget(0.5), until)


PRUNERS = {
    "group_lasso": lambda: create_pruner("group_lasso"),
    "custom": Movement,
    "cubic": lambda: create_pruner("magnitude"),
    "movement": lambda: create_pruner("movement", warmup=0.0, settle=0.5),
    "prune_and_grow": lambda: create_pruner("prune_and_grow", every=0.25, ramp=0.25),
    "prune_and_grow from scratch": lambda: create_pruner("prune_and_grow", every=0.25, ramp=0.0),
}


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_resumed_run_ends_with_the_same_masks_and_weights_bit_for_bit(tmp_path: Path, pruner: str):
    whole = make_model()
    callback = make_callback(whole, PRUNERS[pruner](), 0.5)
    make_trainer(whole, tmp_path, callback).train()
    assert callback.masks is not None

    # After the cut, at it, while pruning: in this order, since each run writes the later checkpoints anew.
    for step in (6, 4, 2):
        resumed = make_model()
        again = make_callback(resumed, PRUNERS[pruner](), 0.5)
        checkpoint = tmp_path / f"checkpoint-{step}"
        make_trainer(resumed, tmp_path, again).train(resume_from_checkpoint=str(checkpoint))
        assert again.masks is not None
        for name, mask in callback.masks.items():
            assert torch.equal(mask.keep, again.masks[name].keep), (step, name)
        first, second = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first), step


def test_once_masks_are_fixed_clipping_counts_kept_blocks_alone(tmp_path: Path):
    """The gradient of pruned blocks is for the search; afterwards it is not there when the Trainer clips."""
    shares: list[bool] = []

    class Watch(PruningCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step > 0:
                masks = current_masks(kwargs["model"])
                hidden = [layer.grad[~masks[layer.name].elements()] for layer in self.layers]  # pyright: ignore
                shares.append(bool(torch.cat(hidden).any()))
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    model = make_model()
    pruner = create_pruner("movement", warmup=0.0, settle=0.5)
    watch = Watch(pruner, select(model, BLOCK).layers, Budget(0.5), 0.5)
    make_trainer(model, tmp_path, watch).train()
    assert shares == [True] * 3 + [False] * 4


TINY = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "conv1d": lambda: transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=16),
    "experts": lambda: transformers.MixtralConfig(
        **TINY, intermediate_size=40, num_key_value_heads=2, num_local_experts=4
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("pruner", ["movement", "prune_and_grow"])
def test_masks_that_change_reach_layers_of_every_kind_and_hide_weights_that_a_resume_restores(
    tmp_path: Path, pruner: str, kind: str
):
    hidden = {}

    class Look(PruningCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 4:
                hidden[len(hidden)] = [layer.weight.clone() for layer in self.layers]
                for mask in current_masks(kwargs["model"]).values():
                    assert mask.block == BLOCK

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            if state.global_step == 4:
                hidden[len(hidden)] = [layer.weight.clone() for layer in self.layers]

    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = transformers.AutoModelForCausalLM.from_config(OTHERS[kind]())
        layers = select(model, BLOCK).layers
        callback = Look(create_pruner(pruner), layers, Budget(0.6), 0.75)
        with own_names(model):  # as a finetune stage does, or the Trainer finds no experts in its checkpoint
            make_trainer(model, tmp_path, callback).train(resume_from_checkpoint=resume)
        elements = sum(layer.weight.numel() for layer in layers)
        kept = sum(mask.elements_kept for mask in unmask(model).values())
        assert abs(kept - 0.4 * elements) <= BLOCK.numel / 2
    assert len(hidden) == 2
    for before, after in zip(hidden[0], hidden[1], strict=True):
        assert torch.equal(before, after)


def test_the_budget_is_met_at_the_end_of_the_phase_and_held_to_the_end_of_training(tmp_path: Path):
    model = make_model()
    callback = make_callback(model, create_pruner("group_lasso"), 0.5)
    make_trainer(model, tmp_path, callback).train()
    layers = select(model, BLOCK).layers
    masks = unmask(model)
    kept = sum(mask.elements_kept for mask in masks.values())
    assert abs(kept - 0.5 * sum(layer.weight.numel() for layer in layers)) <= BLOCK.numel
    for layer in layers:
        elements = masks[layer.name].elements()
        assert not layer.weight[~elements].any() and layer.weight[elements].all()


def test_every_checkpoint_of_the_trainer_loads_plainly_with_the_masks_zeros(tmp_path: Path):
    model = make_model()
    callback = make_callback(model, create_pruner("magnitude"), 0.25)
    make_trainer(model, tmp_path, callback).train()
    assert callback.masks is not None
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    for layer in select(loaded, BLOCK).layers:
        assert not layer.weight[~callback.masks[layer.name].elements()].any()
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    ids = torch.arange(10)[None]
    assert torch.equal(final(ids).logits, model.eval()(ids).logits)


def test_the_pruner_sees_whole_gradients_and_the_optimizer_none_of_pruned_blocks(tmp_path: Path):
    class Watch(Pruner):
        seen = 0.0

        def score(self, layer: PrunableLayer) -> Tensor:
            return layer.weight.new_ones(layer.grid)

        def before_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
            Watch.seen += sum(
                float(layer.grad[~masks[layer.name].elements()].abs().sum()) for layer in layers
            )

        def after_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
            for layer in layers:
                assert not layer.grad[~masks[layer.name].elements()].any()
                assert torch.equal(
                    layer.weight[~masks[layer.name].elements()],
                    before[layer.name][~masks[layer.name].elements()],
                )

    model = make_model()
    layers = select(model, BLOCK).layers
    magnitude = create_pruner("magnitude")
    masks = Budget(0.5).masks({layer.name: magnitude.score(layer) for layer in layers}, layers)
    before = {layer.name: layer.weight.clone() for layer in layers}
    mask_model(model, masks)
    callback = PruningCallback(Watch(), layers, Budget(0.5))
    make_trainer(model, tmp_path, callback, weight_decay=0.0).train()
    assert Watch.seen > 0.0


def test_a_masked_model_heals_and_resumes_without_any_callback(tmp_path: Path):
    def masked() -> nn.Module:
        model = make_model()
        layers = select(model, BLOCK).layers
        magnitude = create_pruner("magnitude")
        masks = Budget(0.5).masks({layer.name: magnitude.score(layer) for layer in layers}, layers)
        mask_model(model, masks, dense_gradient=False)
        return model

    whole, resumed = masked(), masked()
    make_trainer(whole, tmp_path, None).train()
    make_trainer(resumed, tmp_path, None).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    first, second = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    before, after = current_masks(whole), unmask(resumed)
    assert all(torch.equal(before[name].keep, after[name].keep) for name in before)


class Log(Pruner):
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def score(self, layer: PrunableLayer) -> Tensor:
        return layer.weight.new_ones(layer.grid)

    def begin(self, layers: Sequence[PrunableLayer], budget: Budget, progress: float = 0.0) -> None:
        self.calls.append(("begin", progress))

    def before_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        self.calls.append(("before", progress))

    def after_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        self.calls.append(("after", progress))


@pytest.mark.parametrize(
    "resume", [None, 2, 4, 6], ids=["whole", "in warm-up", "where it begins", "in the phase"]
)
def test_warm_up_pruning_and_healing_take_their_shares_of_the_steps(tmp_path: Path, resume: int | None):
    runs = []
    for checkpoint in [None] if resume is None else [None, str(tmp_path / f"checkpoint-{resume}")]:
        pruner, model = Log(), make_model()
        layers = select(model, BLOCK).layers
        callback = PruningCallback(pruner, layers, Budget(0.5), until=0.7, start=0.4)
        make_trainer(model, tmp_path, callback, max_steps=10).train(resume_from_checkpoint=checkpoint)
        runs.append(pruner.calls)
    steps = [
        ("before", 0.0),
        ("after", 1 / 3),
        ("before", 1 / 3),
        ("after", 2 / 3),
        ("before", 2 / 3),
        ("after", 1.0),
    ]
    assert runs[0] == [("begin", 0.0), *steps]
    if resume is not None:
        assert runs[1] == ([("begin", 2 / 3), *steps[4:]] if resume == 6 else runs[0])


def test_a_warm_up_trains_as_if_there_were_no_pruner(tmp_path: Path):
    warm, plain = make_model(), make_model()
    pruner = create_pruner("group_lasso")
    callback = PruningCallback(pruner, select(warm, BLOCK).layers, Budget(0.5), start=0.5)
    make_trainer(warm, tmp_path / "warm", callback).train()
    make_trainer(plain, tmp_path / "plain", None).train()
    load = transformers.AutoModelForCausalLM.from_pretrained
    first, second = load(tmp_path / "warm" / "checkpoint-4"), load(tmp_path / "plain" / "checkpoint-4")
    others = second.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in first.state_dict().items())
    removed = sum(int((layer.weight == 0).sum()) for layer in select(warm, BLOCK).layers)
    assert removed == pytest.approx(
        0.5 * sum(layer.weight.numel() for layer in callback.layers), abs=BLOCK.numel
    )


def test_a_phase_of_no_length_is_refused():
    for until in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"until {until} is out of range"):
            PruningCallback(create_pruner("magnitude"), [], Budget(0.5), until)
    for start in (-0.1, 0.5):
        with pytest.raises(ConfigError, match=f"start {start} is out of range"):
            PruningCallback(create_pruner("magnitude"), [], Budget(0.5), 0.5, start)


def test_layers_of_another_model_are_refused(tmp_path: Path):
    layers = [PrunableLayer("up", "up", nn.Parameter(torch.ones(16, 16)), BLOCK)]
    callback = PruningCallback(create_pruner("magnitude"), layers, Budget(0.5))
    with pytest.raises(ConfigError, match="layer up is no dense weight of the model that is trained"):
        make_trainer(make_model(), tmp_path, callback).train()
