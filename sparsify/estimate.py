"""What a recipe will cost: memory and time of each stage, estimated from shapes and the machine's matmul rate.

Estimates, not measurements: they tell an hour from a minute, and what fits from what does not by far. Both are for one
process; of several, each takes `batch` samples of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.layers.kinds import dense_kind
from sparsify.plan import Plan, resolve_device, skeleton
from sparsify.recipe.schema import (
    ENOUGH,
    CalibrateStage,
    ConvertStage,
    DataSpec,
    EvaluateStage,
    FinetuneStage,
    PruneStage,
    Recipe,
)

# Bytes of a trained parameter: float32 weight and gradient, and AdamW's two moments.
TRAINED_BYTES = 16
# Bytes of activations of one token in one layer, in units of hidden size times the size of a number, where attention
# does not store its scores (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022).
ACTIVATIONS, ACTIVATIONS_RECOMPUTED = 17, 1
# What a training reaches of the rate of its largest matmuls: the rest waits for memory, launches and data.
REACHED = 0.4


@dataclass(frozen=True)
class Estimate:
    """What one stage is expected to need.

    Attributes:
        stage: Its name.
        memory: Bytes on the device at its peak.
        seconds: How long it takes; `None` where that depends on what is not known before, such as the length of data.
    """

    stage: str
    memory: int
    seconds: float | None


def estimate(recipe: Recipe, plan: Plan) -> list[Estimate]:
    """One estimate for each stage of a recipe that has been planned; measures matmuls for a tenth of a second.

    Args:
        recipe: The recipe, with `model` set.
        plan: Its plan.
    """
    model = skeleton(recipe)
    sizes = _Sizes(model, plan)
    device = resolve_device(recipe.device)
    rates: dict[torch.dtype, float] = {}

    def rate(dtype: torch.dtype) -> float:
        if dtype not in rates:
            rates[dtype] = matmul_rate(device, dtype)
        return rates[dtype]

    dtype = next(model.parameters()).dtype
    density, packed, found = 1.0, False, []
    for stage in recipe.stages:
        if isinstance(stage, FinetuneStage) and stage.skipped:
            memory, seconds = 0, 0.0
        elif isinstance(stage, FinetuneStage):
            training = _training_dtype(stage, device)
            spec = recipe.data.train
            assert spec is not None
            density = density if stage.pruner is None else 1 - stage.pruner.sparsity
            packed = packed or stage.heal == "packed"
            memory = sizes.training_memory(stage, spec, density if packed else 1.0, training)
            tokens = _training_tokens(stage, spec, sizes)
            cost = sizes.products(density if packed else 1.0) * (8 if stage.distill is not None else 6)
            seconds = None if tokens is None else tokens * cost / (REACHED * rate(training))
        else:
            if isinstance(stage, PruneStage):
                density = 1 - stage.sparsity
            packed = packed or (isinstance(stage, ConvertStage) and stage.format == "block_sparse")
            memory = sizes.inference_memory(stage, recipe, density if packed else 1.0, dtype)
            tokens = _read_tokens(stage, recipe, sizes)
            cost = 2 * sizes.products(density if packed else 1.0)
            # Second-order pruners and the like take their own time.
            walks = isinstance(stage, PruneStage) and any(s.stage == "calibrate" for s in recipe.stages)
            seconds = None if tokens is None or walks else tokens * cost / (REACHED * rate(dtype))
        found.append(Estimate(stage.stage, int(memory), seconds))
    return found


class _Sizes:
    """The numbers of a model that its cost follows from."""

    def __init__(self, model: Any, plan: Plan) -> None:
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.pruned = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
        self.hidden = getattr(text, "hidden_size", None) or getattr(text, "d_model", 0) or 0
        self.layers = getattr(text, "num_hidden_layers", 0) or 0
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.vocabulary = 0 if head is None else (getattr(text, "vocab_size", 0) or 0)
        weights = [
            module._parameters.get("weight")
            for module in model.modules()
            if dense_kind(module) not in (None, "embedding")
        ]
        multiplied = {id(weight): weight.numel() for weight in weights if weight is not None}
        self.multiplied = max(sum(multiplied.values()), self.pruned)
        patch, image = getattr(config, "patch_size", None), getattr(config, "image_size", None)
        self.positions: int | None = None
        if isinstance(patch, int) and isinstance(image, int):
            self.positions = (image // patch) ** 2 + 1  # of a picture

    def products(self, density: float) -> float:
        """Multiplications of one token's forward pass."""
        return self.multiplied - (1 - density) * self.pruned

    def training_memory(
        self, stage: FinetuneStage, spec: DataSpec, density: float, dtype: torch.dtype
    ) -> float:
        kept = self.parameters - (1 - density) * self.pruned
        tokens = stage.batch * (self.positions or spec.length)
        size = dtype.itemsize
        if stage.gradient_checkpointing:
            stored = self.layers * ACTIVATIONS_RECOMPUTED + ACTIVATIONS
        else:
            stored = self.layers * ACTIVATIONS
        activations = tokens * (stored * self.hidden * size + self.vocabulary * (size + 8))
        masked = self.pruned * size if density == 1.0 else 0  # effective weights, kept for the backward pass
        copies = kept * size if size < 4 else 0  # autocast's
        return kept * TRAINED_BYTES + masked + copies + activations

    def inference_memory(self, stage: Any, recipe: Recipe, density: float, dtype: torch.dtype) -> float:
        weights = self.bytes * (1 - (1 - density) * self.pruned / max(self.parameters, 1))
        spec = recipe.data.eval if isinstance(stage, EvaluateStage) else recipe.data.calibration
        if spec is None or not isinstance(stage, (CalibrateStage, EvaluateStage)):
            return weights
        tokens = stage.batch * (self.positions or spec.length)
        return weights + tokens * (ACTIVATIONS * self.hidden * dtype.itemsize + self.vocabulary * 4)


def _training_dtype(stage: FinetuneStage, device: torch.device) -> torch.dtype:
    if stage.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, stage.precision)


def _training_tokens(stage: FinetuneStage, spec: DataSpec, sizes: _Sizes) -> float | None:
    length = sizes.positions or spec.length
    if stage.steps is not None:
        return stage.steps * stage.batch * stage.accumulate * length
    return None if spec.samples is None or stage.epochs is None else stage.epochs * spec.samples * length


def _read_tokens(stage: Any, recipe: Recipe, sizes: _Sizes) -> float | None:
    if isinstance(stage, CalibrateStage) and recipe.data.calibration is not None:
        length = sizes.positions or recipe.data.calibration.length
        return ENOUGH if stage.samples is None else stage.samples * length
    if isinstance(stage, EvaluateStage) and recipe.data.eval is not None:
        spec = recipe.data.eval
        return None if spec.samples is None else spec.samples * (sizes.positions or spec.length)
    return 0


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second times two of a large matrix product here, the best of a few."""
    side = 4096 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return 2 * side**3 / min(seconds() for _ in range(5))
