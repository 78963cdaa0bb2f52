"""The whole model, end to end, against a dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify import measure
from sparsify.bench import agreement
from sparsify.bench.timing import race
from sparsify.layers.experts import BlockSparseExperts
from sparsify.layers.swap import sparse_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def usable_counts(model: nn.Module, tokens: Sequence[int]) -> tuple[list[int], list[str]]:
    """Token counts that the model takes as one sequence, and why others are left out."""
    config: Any = getattr(model, "config", None)
    if not isinstance(getattr(config, "vocab_size", None), int):
        return [], [f"end to end is not timed: {type(model).__name__} takes no tokens"]
    limit = getattr(config, "max_position_embeddings", None)
    usable = [count for count in sorted(set(tokens)) if limit is None or count <= limit]
    left_out = [count for count in sorted(set(tokens)) if count not in usable]
    return usable, [
        f"end to end is not timed at {count} tokens: the model takes {limit}" for count in left_out
    ]


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model with the sparse one's weights, zeros where no block is stored.

    It shares every tensor that is not packed, so that it needs the memory of the pruned weights alone.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for module in sparse_modules(model).values():
        shared[id(module)] = module
    twin = deepcopy(model, shared)
    twin.dequantize()
    return twin


def check(model: nn.Module, twin: nn.Module, tokens: Sequence[int]) -> dict[int, float]:
    """Relative error of the model's output by token count, against its dense twin.

    Raises:
        SparsifyError: If it exceeds the dtype's budget.
    """
    routed = any(isinstance(module, BlockSparseExperts) for module in sparse_modules(model).values())
    errors = {}
    for count in tokens:
        inputs = _inputs(model, count)
        with torch.no_grad():
            actual, expected = _output(model, inputs), _output(twin, inputs)
        errors[count] = agreement.check_model(actual, expected, routed)
    return errors


def fill_zeros(twin: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    """Puts random values of the usual size where a twin's weights are zero.

    Zeros draw less power on a GPU, and would flatter the dense model.

    Args:
        twin: What `dense_twin` made.
        names: Names of the weights that were packed, by module.
    """
    with torch.no_grad():
        for name, weights in names.items():
            for weight in map(twin.get_submodule(name).get_parameter, weights):
                missing = weight == 0
                size = (
                    weight.float().square().sum().div((~missing).sum().clamp_min(1)).sqrt().to(weight.dtype)
                )
                weight.copy_(torch.where(missing, torch.randn_like(weight) * size, weight))


def measure_models(
    sparse: nn.Module,
    dense: nn.Module,
    errors: Mapping[int, float],
    repeats: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Times both models on one sequence, in turns.

    Args:
        sparse: The block-sparse model.
        dense: The dense one, on the same device.
        errors: What `check` found; its token counts are timed.
        repeats: Rounds of each race.
        advance: Called after each token count.

    Returns:
        Rows as `layers.measure_group` gives them. On a GPU there are two for each token count, as CUDA graphs and
        eager; only the second if a model cannot be captured.
    """
    device = next(sparse.parameters()).device
    rows = []
    for count, error in errors.items():
        inputs = _inputs(sparse, count)
        calls = {
            "dense": lambda inputs=inputs: dense(**inputs),
            "sparse": lambda inputs=inputs: sparse(**inputs),
        }
        outcomes = [race(calls, device, repeats)]
        if outcomes[0].timing == "graph":
            outcomes.append(race(calls, device, repeats, graphs=False))
        for times in outcomes:
            seconds = times.seconds
            rows.append(
                {
                    "tokens": count,
                    "dense_us": seconds["dense"] * 1e6,
                    "sparse_us": seconds["sparse"] * 1e6,
                    "speedup": seconds["dense"] / seconds["sparse"],
                    "error": error,
                    "timing": times.timing,
                    "rounds": times.rounds,
                }
            )
        advance()
    return rows


def _inputs(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    inputs = measure.token_inputs(model, tokens)
    # All ones: without it no model waits for the GPU to find that out.
    del inputs["attention_mask"]
    return inputs


def _output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first floating-point tensor of a model's output: logits, or the last hidden state."""
    output = model(**inputs)
    return next(part for part in output.to_tuple() if isinstance(part, Tensor) and part.is_floating_point())
