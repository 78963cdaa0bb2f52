"""Pruning in anybody's training script: what `SparsifyLoop` and `SparsifyCallback` share, and the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from sparsify.blocks import BlockMask, BlockShape
from sparsify.calibration.statistics import collect_statistics
from sparsify.errors import CheckpointError, ConfigError
from sparsify.masking import unmask
from sparsify.permutation import permute
from sparsify.preparation import budget, prepare
from sparsify.recipe.faults import describe, from_pydantic
from sparsify.recipe.schema import PruneStage, Recipe, Search
from sparsify.training.pruning_loop import PruningLoop
from sparsify.training.sharding import is_sharded, share_statistics

Source = Recipe | str | Path | None
Calibration = Iterable[Mapping[str, Any]] | None


class SparsifyLoop(PruningLoop):
    """Pruning in a PyTorch or accelerate training loop of one's own, in three lines.

        loop = sparsify.SparsifyLoop(model, optimizer, steps=len(batches), block="64x64", sparsity=0.5, until=0.7)
        accelerator.register_for_checkpointing(loop)    # or keep loop.state_dict() with the model's
        ...                                             # train as ever
        loop.finish()

    Each `optimizer.step()` moves the loop on, by hooks of the optimizer. Weights are masked in the forward pass, so
    that whatever the optimizer, accumulation, mixed precision and sharding do, none of them can lose the mask.

    Args:
        model: The model, after `accelerator.prepare` or `fully_shard`; in DistributedDataParallel or not.
        optimizer: Its optimizer, accelerate's or torch's.
        recipe: A recipe that prunes in one stage: its path, its name, or a `Recipe`. Only that stage's pruning is read.
        steps: Optimizer steps of the whole training.
        calibration: Batches of the model's keyword arguments, for pruners and scopes that need statistics of inputs.
        **settings: Keys of a finetune stage's `pruner`, which win over the recipe's: `method`, `block`, `sparsity`,
            `start`, `until`, `schedule`, ...

    Raises:
        SparsifyError: A child of it for whatever is wrong with the recipe, the settings or the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Source = None,
        *,
        steps: int,
        calibration: Calibration = None,
        **settings: Any,
    ) -> None:
        if steps < 1:
            raise ConfigError(
                f"steps {steps} is out of range: it is the number of optimizer steps, at least 1"
            )
        plain = unwrapped(model)
        super().__init__(**make_loop(plain, search_settings(recipe, settings), calibration))
        self.begin(plain, steps)
        inner = getattr(
            optimizer, "optimizer", optimizer
        )  # accelerate's wrapper also steps where it only accumulates
        self._hooks = [
            inner.register_step_pre_hook(lambda *_: self.before_step()),
            inner.register_step_post_hook(lambda *_: self.after_step()),
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's own `state_dict`; all processes must call it.

        Numbers, strings and tensors alone, so that `torch.load(..., weights_only=True)` reads it.
        """
        stored = self.stored()
        masks = {
            name: {"keep": mask.keep, "shape": mask.shape, "block": astuple(mask.block)}
            for name, mask in stored["masks"].items()
        }
        return {**stored, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the model's own is loaded before.

        Raises:
            CheckpointError: If it is of other layers, or damaged.
        """
        try:
            masks = {
                name: BlockMask(entry["keep"].cpu(), tuple(entry["shape"]), BlockShape(*entry["block"]))
                for name, entry in state["masks"].items()
            }
            stored = {
                **{key: state[key] for key in ("step", "fixed", "statistics", "hidden")},
                "masks": masks,
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the stored state of pruning is damaged: no {error}") from error
        self.begin(self.model, self.steps, stored)

    def finish(self, *, convert: bool = True) -> dict[str, BlockMask]:
        """Ends pruning: the masks become part of the model, and the optimizer is let go.

        Args:
            convert: Swap the pruned layers for block-sparse ones, which store and compute only what is kept; `False`
                leaves dense layers with zeros.

        Returns:
            The masks by layer name.

        Raises:
            ConfigError: If the pruning phase is not over, or the model is sharded.
        """
        masks = finish(self, convert)
        for hook in self._hooks:
            hook.remove()
        return masks


def search_settings(recipe: Source, settings: Mapping[str, Any]) -> Search:
    """The pruning of a recipe, with settings that win over it.

    Args:
        recipe: A recipe that prunes in one stage, as a path, a name or a `Recipe`; or `None`.
        settings: Keys of a finetune stage's `pruner`.

    Raises:
        ConfigError: If the recipe or a setting is invalid, or it does not prune in exactly one stage.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        ready = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        pruned = [
            stage if isinstance(stage, PruneStage) else getattr(stage, "pruner", None)
            for stage in ready.stages
        ]
        found = [stage for stage in pruned if stage is not None]
        if len(found) != 1:
            raise ConfigError(
                f"recipe {ready.name} prunes in {len(found)} stages: here it must be one, or give method, block and "
                f"sparsity as keywords"
            )
        values = {
            key: getattr(found[0], key) for key in found[0].model_fields_set if key in Search.model_fields
        }
    values |= {
        key: list(value) if isinstance(value, tuple) and key != "block" else value
        for key, value in settings.items()
    }
    try:
        return Search(**values)
    except ValidationError as error:
        raise ConfigError(describe(from_pydantic(error, Search), None)) from error


def make_loop(
    model: nn.Module,
    search: Search,
    calibration: Calibration = None,
    fresh: bool = True,
) -> dict[str, Any]:
    """What a `PruningLoop` for the model is made from.

    Args:
        model: The model to train.
        search: What to prune, and how.
        calibration: Batches for the statistics that pruner or scope need.
        fresh: Whether training starts; a resumed one has units in order and statistics stored.

    Raises:
        SparsifyError: A child of it if the settings do not fit the model.
    """
    pruner, selection = prepare(model, search, walks=not fresh or calibration is not None)
    if fresh and search.permute:
        if any(is_sharded(layer.parameter) for layer in selection.layers):
            raise ConfigError(
                "units of sharded weights cannot be reordered: call sparsify.permute before sharding"
            )
        permute(model, search.block, search.sparsity, weights={layer.name for layer in selection.layers})
    if fresh and calibration is not None:
        collect_statistics(model, selection.layers, pruner, calibration)
        share_statistics(selection.layers)
    return {
        "pruner": pruner,
        "layers": selection.layers,
        "budget": budget(search),
        "until": search.until,
        "start": search.start,
        "schedule": search.schedule,
        "every": search.every,
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and `torch.compile`."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


def finish(loop: PruningLoop, convert: bool) -> dict[str, BlockMask]:
    """Makes the fixed masks of a loop permanent, and packs the model if asked to.

    Raises:
        ConfigError: If the pruning phase is not over, or the model is sharded.
    """
    from transformers import PreTrainedModel

    from sparsify.checkpoint.quantizer import attach
    from sparsify.layers import swap

    if loop.masks is None:
        raise ConfigError(
            f"pruning is not over: {loop.step} of {loop.steps} steps are done, and the masks are fixed after step "
            f"{loop.last}"
        )
    if any(is_sharded(layer.parameter) for layer in loop.layers):
        raise ConfigError(
            "the weights are sharded: save the model (it is dense, with zeros), load it in one process, and pack it "
            "with sparsify.apply(model, loop.masks)"
        )
    unmask(loop.model)
    if convert:
        swap.convert(loop.model, dict(loop.masks))
        if isinstance(loop.model, PreTrainedModel):
            attach(loop.model)
    return dict(loop.masks)
